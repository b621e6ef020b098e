"""What a drafter is worth without a server: tau over answers, of one drafter or of two that are compared."""

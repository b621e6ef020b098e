"""From prompts to a drafter that SGLang serves."""

"""Go on with a drafter from what its server recorded, and replace it only by a better one."""

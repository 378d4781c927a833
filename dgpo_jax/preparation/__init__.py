"""A source of problems made into one to train on: `steps` drops problems and says why, `report` writes it down. `prepare` tells the story."""

"""Part 3, Spatial-RL: online GRPO with top-k filtering on a flow-matching image generator."""

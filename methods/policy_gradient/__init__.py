"""Policy gradients on the sampling chain: DDPO, GRPO, DPOK, and the family of Flow-GRPO."""

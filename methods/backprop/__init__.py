"""Methods that backpropagate the reward through the sampler: DRaFT, AlignProp, LeapAlign, ReFL."""

"""From noise to samples: the transition kernel, the trajectory, named noise."""

"""fleet: the commands around the workers: the local stack, the scaler, `top`, `doctor`, `render`, `simulate`, `demo`."""

"""observe: what a worker reports about itself: metrics, totals for the scaler, traces, logs."""

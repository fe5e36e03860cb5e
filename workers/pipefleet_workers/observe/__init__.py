"""What a worker tells of itself: metrics, totals for the scaler, traces, logs."""

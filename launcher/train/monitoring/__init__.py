"""What is measured beside the steps: open monitor.py first; rank_stats.py, step_metrics.py and anomalies.py hold the numbers."""

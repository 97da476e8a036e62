"""What is measured beside the steps: open monitor.py first; step_metrics.py has the numbers, anomalies.py the alerts."""

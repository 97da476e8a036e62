"""What a run reports and what it has cost: metrics, events, goodput, verdicts, W&B; open tracker.py first."""

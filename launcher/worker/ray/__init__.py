"""The worker side of cluster=ray: the driver, and the agent that Ray Train places on each node. Open driver.py first."""

"""The worker side of cluster=ray: the driver, the coordinator and the supervisor of each rank. Open driver.py first."""

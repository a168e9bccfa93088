"""A config of plans: the plain student of ``kdgraft bench det`` on its digit scenes, in ``runs/demo/det/data``."""

# Upstream's mmengine takes a file with an import of another package for one of its lazy configs, in which nothing can be called.
globals().update(__import__("kdgraft_bench.hosts.det_setup", fromlist=["det_setup"]).plan_config("runs/demo/det/data"))

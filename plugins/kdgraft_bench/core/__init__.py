"""``kdgraft experiments``: the experiments of the literature, repeated with small nets on digits that are hard to read."""

"""The costs of distilling in each host: ``kdgraft bench --costs``."""

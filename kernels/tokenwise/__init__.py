"""Row programs: what no statistic serves, computed in windows of tokens."""

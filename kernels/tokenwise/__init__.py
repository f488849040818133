"""Token programs: values that no statistic gives, computed in windows of tokens."""

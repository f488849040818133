"""Token programs: functions of the logits that no row statistic expresses, computed in windows of tokens."""

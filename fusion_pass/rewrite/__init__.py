"""From a site that is to be fused to the ops that compute it."""

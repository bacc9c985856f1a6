"""Networks, assembled from the steps and operators of qpde."""

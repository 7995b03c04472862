"""The library of datadose: no argv, no environment, no Kubernetes. jobs/ holds what runs."""

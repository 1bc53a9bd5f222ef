"""The way of a base: families, where it comes from, ready on a device; sampling, quantisation, compilation."""

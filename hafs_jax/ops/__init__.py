"""Array primitives that know nothing of SAEs: matrix products in a dtype, and selection of the largest entries."""

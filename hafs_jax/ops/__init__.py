"""Array primitives that know nothing about SAEs: matrix products in a dtype, selection of the largest entries."""

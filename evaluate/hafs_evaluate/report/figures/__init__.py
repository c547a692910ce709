"""Figures: what each shows (`panels`, `frontiers`), how an arm looks (`styles`), and how they are drawn (`draw`)."""

"""Measures trained SAEs: export, core metrics, the spliced language model, probing, single latents, the report."""

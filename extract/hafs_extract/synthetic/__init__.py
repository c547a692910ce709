"""Synthetic worlds, whose true features are known (`worlds`), and stores sampled from them (`samples`)."""

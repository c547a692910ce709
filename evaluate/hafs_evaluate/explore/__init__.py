"""The live explorer: a server on this machine that shows what the latents of finished runs do on a text one types.

`explorer` holds the language model and the SAEs; `reading` and `steering` compute; `requests` says what may
be asked; `worker` runs one job at a time; `guard`, `app`, `ports` and `serve` are the server.
"""

"""What decides the results of single latents and of domains. No torch: these are read to see what there is to do."""

from dataclasses import dataclass

from hafs_jax.base.options import check, option


@dataclass(frozen=True)
class LatentsConfig:
    """How many latents have a dashboard, and how much it shows of each."""

    max_rows: int = option(
        131_072, "rows read; the store is shuffled, so that its first rows are a random sample", least=1
    )
    latents: int = option(300, "latents shown in full, spread evenly over the density ranks [latents]", least=0)
    others: int = option(16_384, "further latents shown in short; those that links lead to come first", least=0)
    examples: int = option(20, "top contexts per latent, each from another document [contexts]", least=1)
    random_examples: int = option(
        10, "contexts per latent at even quantiles of its activation, each from another document [contexts]", least=0
    )
    other_examples: int = option(4, "top contexts of a latent shown in short [contexts]", least=0)
    other_random_examples: int = option(3, "contexts at quantiles of a latent shown in short [contexts]", least=0)
    seed: int = option(0, "seed of the draw of random contexts", least=0)
    tokens_before: int = option(24, "tokens shown before the peak [tokens]", least=0)
    tokens_after: int = option(12, "tokens shown after the peak [tokens]", least=0)
    promoted: int = option(10, "promoted tokens per latent, and as many suppressed ones [tokens]", least=0)
    neighbours: int = option(6, "nearest dictionary vectors per latent [latents]", least=1)
    partners: int = option(5, "latents that it fires with, per latent [latents]", least=0)
    partner_rows: int = option(10, "fewest rows on which a partner fires with it [rows]", least=1)
    shares: int = option(5, "latents whose dictionary vectors share its direction, per latent [latents]", least=0)
    shared_cosine: float = option(
        0.2, "least cosine at which two dictionary vectors share a direction", above=0, most=1
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class DomainsConfig:
    """How latents are judged as detectors of a source."""

    documents: int = option(4096, "held-out documents looked at, at most, drawn with the seed [documents]", least=4)
    seed: int = option(0, "seed of that draw and of the halves of the documents", least=0)
    precision: float = option(0.8, "least precision of a detector, by documents", least=0, most=1)
    recall: float = option(0.2, "least recall of a detector, by documents", least=0, most=1)
    union: int = option(5, "latents in a union, which fires where any of them does [latents]", least=1)
    shown: int = option(50, "latents listed, of the highest F1 by documents [latents]", least=0)

    def __post_init__(self) -> None:
        check(self)

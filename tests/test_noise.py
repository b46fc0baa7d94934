"""Random bits: each place has its own, in whatever words they are computed."""

import torch
from checks import check_noise

from specdistill_kernels import counter_noise
from specdistill_kernels.verification.noise import _SALTS, DRAFT, _bits, _parts


def test_no_two_places_share_their_noise() -> None:
    check_noise()


def test_noise_is_the_same_in_words_of_32_bits_and_of_64() -> None:
    random = torch.Generator().manual_seed(0)
    seeds = torch.randint(2**63 - 1, (7, 1), generator=random).expand(7, 5)
    step = torch.randint(2**40, (7, 1), generator=random).expand(7, 5)
    position, tokens = torch.arange(5).expand(7, 5), torch.arange(0, 300_000, 331)
    wide = _bits(_parts(seeds, step, position, tokens, DRAFT), torch.tensor(_SALTS))
    assert torch.equal(counter_noise(seeds, step, position, DRAFT, tokens), wide)

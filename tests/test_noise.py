"""Random bits: each place has its own."""

from checks import check_noise


def test_no_two_places_share_their_noise() -> None:
    check_noise()

import pytest
import torch

from genft_kernels import philox

# Known answers of Random123 (kat_vectors, philox4x32 10): counter words, key words, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
]


def plain_philox(counter, key):
    """The published round function, word by word in Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return tuple(c)


@pytest.mark.parametrize("counter, key, result", KNOWN)
def test_philox_gives_the_known_answers(counter, key, result):
    assert plain_philox(counter, key) == result
    assert tuple(philox.words(torch.tensor([0]), torch.tensor([0]), 0)[0].tolist()) == result


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**40 + 12345, 2**63 - 1, -1, -(2**63)])
@pytest.mark.parametrize("stream", [0, 1, 2])
def test_words_match_the_published_rounds(seed, stream):
    counters = [0, 1, 77, 2**32 - 1, 2**32, 2**40 + 3]
    words = philox.words(torch.tensor(counters), torch.tensor([seed]), stream)
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    for q, row in zip(counters, words.tolist(), strict=True):
        assert tuple(row) == plain_philox((q & 0xFFFFFFFF, q >> 32, stream, 0), key)


def test_counters_are_worked_on_in_pieces_without_a_seam(monkeypatch):
    seed = torch.tensor([9])
    whole = philox.words(torch.arange(1000), seed, 1), philox.keep_mask(seed, 1, 37, 90, 0.5)
    monkeypatch.setattr(philox, "_PIECE", 64)
    assert torch.equal(philox.words(torch.arange(1000), seed, 1), whole[0])
    assert torch.equal(philox.keep_mask(seed, 1, 37, 90, 0.5), whole[1])


@pytest.mark.parametrize("in_features, out_features", [(1, 1), (3, 63), (63, 3), (5, 8)])
def test_mask_is_the_word_of_each_element(in_features, out_features):
    seed, p = 2**35 + 7, 0.37
    mask = philox.keep_mask(torch.tensor([seed]), 1, in_features, out_features, p)  # [out, in]
    blocks = -(-out_features // 4)
    for i in range(in_features):
        for j in range(out_features):
            word = plain_philox((i * blocks + j // 4, 0, 1, 0), (seed & 0xFFFFFFFF, seed >> 32))[j % 4]
            assert mask[j, i].item() == (word >= int(p * 2**32))


def test_rows_of_a_mask_are_rows_of_the_whole_mask():
    seed = torch.tensor([5])
    whole = philox.keep_mask(seed, 0, 21, 50, 0.3)
    for start, stop in ((0, 8), (8, 50), (48, 50)):
        assert torch.equal(philox.keep_mask(seed, 0, 21, 50, 0.3, slice(start, stop)), whole[start:stop])
    with pytest.raises(ValueError, match="multiple of 4"):
        philox.keep_mask(seed, 0, 21, 50, 0.3, slice(2, 8))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.9])
def test_share_kept_is_one_minus_p(p):
    keep = philox.keep_mask(torch.tensor([123]), 0, 400, 500, p).double()
    assert abs(keep.mean().item() - (1 - p)) < 4 * (p * (1 - p) / keep.numel()) ** 0.5 + 1e-12


def test_streams_and_seeds_are_independent():
    masks = [philox.keep_mask(torch.tensor([s]), t, 100, 100, 0.5).double() for s, t in ((1, 0), (1, 1), (2, 0))]
    for i in range(3):
        for j in range(i):
            agreement = (masks[i] == masks[j]).double().mean().item()
            assert abs(agreement - 0.5) < 0.03

"""Question 3's parts, each against a reference written otherwise: text, sound, network, decoding, similarities, losses.

The network's references are the statement's formulas, one head and one clip at a time, the whole prefix at each step.
"""

import collections
import html
import itertools
import math
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import jellyfish
import numpy as np
import pytest
import textdistance
import torch
import torch.nn.functional as F
import torchaudio
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import asr
import utils
from utils import InputError

nb = utils.notebook_definitions(ROOT / "hw2-q3.ipynb")
PAD, UNKNOWN, START, STOP = range(4)
RATE = utils.SPEECH_RATE
DECODERS = ("lstm", "transformer")
both_decoders = pytest.mark.parametrize("decoder", DECODERS)
both_forms = pytest.mark.parametrize("form", ["statement", "pre-norm"])


def tiny(**changes):
    """Settings of a network that is quick on one thread."""
    small = {"width": 16, "heads": 2, "encoder_blocks": 2, "kernel_size": 3, "n_mels": 12, "dropout": 0.0}
    fixed = {"subsampling": 4, "block_form": "statement", "ctc_weight": 0.3, "guide_weight": 0.0, "spec_augment": False}
    fixed |= {"normalise_clips": False, "mel_shift": 0.0, "text_dropout": 0.0, "attention_window": None}
    return nb.replace(nb.PRESETS["improved"], **(small | fixed | changes))


def network(decoder, seed=0, **changes):
    """A random network whose norms and statistics differ from ones and zeros, so that none can be left out unseen."""
    torch.manual_seed(seed)
    model = nb.SpeechToText(decoder, tiny(**changes)).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.normal_(1.0, 0.3)
                module.bias.normal_(0.0, 0.3)
        model.encoder.feature_mean.normal_()
        model.encoder.feature_std.uniform_(0.5, 2.0)
        model.encoder.position_rate.fill_(0.7)
    return model


def random_batch(lengths, characters=9, mels=12, seed=0):
    """Audio [B, T, mels] that goes on after each clip's end, its lengths [B], text [B, characters + 1] from START."""
    generator = torch.Generator().manual_seed(seed)
    audio = torch.randn(len(lengths), max(lengths), mels, generator=generator)
    text = torch.randint(STOP + 1, nb.VOCABULARY, (len(lengths), characters + 1), generator=generator)
    text[:, 0] = START
    return audio, torch.tensor(lengths), text


def close(ours, theirs, atol=1e-5):
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


class Elements(HTMLParser):
    """The elements of a page, as a browser would see them."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, text):
        self.text.append(text)


# ---------------------------------------------------------------------------------------------------
# Settings


@pytest.mark.parametrize("preset", ["improved", "homework"])
def test_overrides_change_their_settings_alone(preset):
    chosen = nb.choose_settings(preset, {"width": 24, "epochs": 3})
    assert chosen == nb.replace(nb.PRESETS[preset], width=24, epochs=3)
    assert nb.choose_settings(preset, {}) == nb.PRESETS[preset]
    from_yaml = nb.choose_settings(preset, {"learning_rate": "1e-4", "betas": [0.8, 0.9], "clip_norm": None})
    assert (from_yaml.learning_rate, from_yaml.betas, from_yaml.clip_norm) == (1e-4, (0.8, 0.9), None)


@pytest.mark.parametrize(
    ("preset", "overrides", "named"),
    [
        ("better", {}, "better"),
        ("improved", {"widht": 8, "epochs": 2}, "widht"),
        ("improved", {"kernel_size": 4}, "kernel_size"),
        ("improved", {"local_kernel": 4}, "local_kernel"),
        ("improved", {"heads": 3}, "heads"),
        ("improved", {"average_epochs": 3}, "average_epochs"),
        ("improved", {"learning_rate": "fast"}, "learning_rate"),
        ("improved", {"ctc_weight": 0.0, "guide_weight": 0.1}, "guide_weight"),
        ("improved", {"subsampling": 3}, "subsampling"),
        ("homework", {"block_form": "post-norm"}, "post-norm"),
        ("improved", '{"epochs": 2}', "a mapping"),
        ("improved", [["epochs", 2]], "a mapping"),
        ("improved", None, "a mapping"),
        (["improved"], {}, "preset"),
        ({"improved": 1}, {}, "preset"),
        (None, {}, "preset"),
        ("improved", {3: 4}, "3"),
        ("improved", {"epochs": "3"}, "epochs must be a int"),
        ("improved", {"overrides": {"epochs": 2}}, "overrides"),
        ("improved", {"epochs": {"epochs": 2}}, "epochs"),
        ("improved", {"epochs": 10**400}, "epochs"),
        ("improved", {"epochs": 10**5000}, "epochs"),
        ("improved", {"learning_rate": 10**5000}, "learning_rate"),
        ("improved", {"two\nlines": 1}, "lines"),
        ("improved", {"epochs": -(10**400)}, "epochs"),
        ("improved", {"width": 10**7}, "width"),
        ("improved", {"epochs": 2.5}, "epochs"),
        ("improved", {"epochs": True}, "epochs"),
        ("improved", {"width": None}, "width"),
        ("improved", {"bucketing": "false"}, "bucketing"),
        ("improved", {"learning_rate": None}, "learning_rate"),
        ("improved", {"learning_rate": float("nan")}, "learning_rate"),
        ("improved", {"betas": 0.9}, "betas"),
        ("improved", {"betas": [0.9]}, "betas"),
        ("improved", {"betas": [0.9, 0.99, 0.999]}, "betas"),
        ("improved", {"betas": [0.9, 1.0]}, "betas"),
        ("improved", {"betas": [-0.1, 0.9]}, "betas"),
        ("improved", {"betas": [0.9, float("nan")]}, "betas"),
        ("improved", {"betas": {0.9: 1, 0.99: 2}}, "betas"),
        ("improved", {"betas": "99"}, "betas"),
        ("improved", {"betas": [10**400, 0.9]}, "betas"),
        ("improved", {"learning_rate": float("inf")}, "learning_rate"),
        ("improved", {"learning_rate": 10**400}, "learning_rate"),
        ("improved", {"learning_rate": 0}, "learning_rate"),
        ("improved", {"weight_decay": float("inf")}, "weight_decay"),
        ("improved", {"ctc_weight": float("nan")}, "ctc_weight"),
        ("improved", {"guide_weight": float("inf")}, "guide_weight"),
        ("improved", {"clip_norm": float("nan")}, "clip_norm"),
        ("improved", {"clip_norm": 0}, "clip_norm"),
        ("improved", {"attention_window": float("inf")}, "attention_window"),
        ("improved", {"label_smoothing": 1}, "label_smoothing"),
        ("improved", {"heads": 0}, "heads"),
        ("improved", {"max_characters": 0}, "max_characters"),
        ("improved", {"dropout": 2}, "dropout"),
        ("improved", {"ctc_weight": 1.5}, "ctc_weight"),
        ("improved", {"warmup_steps": -1}, "warmup_steps"),
    ],
)
def test_settings_that_cannot_be_are_named_in_one_line(preset, overrides, named):
    with pytest.raises(InputError) as error:
        nb.choose_settings(preset, overrides)
    assert named in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 200


def test_every_number_of_the_settings_has_limits_that_the_presets_keep():
    numbers = {
        name
        for name, value in vars(tiny(max_characters=9, attention_window=1.0)).items()
        if not isinstance(value, bool | str)
    }
    assert set(nb.LIMITS) == numbers
    for preset in nb.PRESETS.values():
        for name, (low, high) in nb.LIMITS.items():
            assert all(low <= value <= high for value in asr.numbers(getattr(preset, name))), name


def test_the_homework_preset_is_what_the_statement_prescribes():
    homework = nb.PRESETS["homework"]
    assert (homework.width, homework.heads, homework.encoder_blocks) == (200, 2, 4)
    assert (homework.max_characters, homework.label_smoothing, homework.learning_rate) == (97, 0.1, 1e-3)
    assert (homework.epochs, homework.batch_size, homework.block_form) == (15, 64, "statement")
    assert (homework.ctc_weight, homework.guide_weight) == (0.0, 0.0)
    assert (homework.betas, homework.dropout, homework.spec_augment) == ((0.9, 0.999), 0.0, False)
    for decoder in ("lstm", "transformer"):
        model = nb.SpeechToText(decoder, homework)
        shapes = [(c.kernel_size, c.padding, c.stride, c.out_channels) for c in model.encoder.convolutions]
        assert shapes == [((3,), (1,), (1,), 200), ((3,), (1,), (2,), 200)]
        assert len(model.encoder.blocks) == 4 and model.ctc is None
        assert not any(isinstance(module, nn.Conv2d) for module in model.encoder.blocks.modules())
        for block in [*model.encoder.blocks, model.decoder.cross_block]:
            assert block.attention.heads == 2
            linear, activation, last = block.feed_forward
            assert (linear.in_features, linear.out_features, last.out_features) == (200, 400, 200)
            assert isinstance(activation, nn.GELU)
        assert model.decoder.output.out_features == 35
        audio, lengths, text = random_batch([30, 21], mels=homework.n_mels)
        memory, mask = model.encoder(audio, lengths)
        assert memory.shape == (2, 15, 200) and mask.sum(dim=1).tolist() == [15, 11]
        assert model(audio, lengths, text).shape == (2, 10, 35)


def test_the_decoders_share_encoder_and_all_but_what_reads_the_text():
    parts = {d: {name for name, _ in network(d).decoder.named_children()} for d in DECODERS}
    assert parts["lstm"] - parts["transformer"] == {"lstm", "embedding_norm"}
    assert parts["transformer"] - parts["lstm"] == {"self_attention", "self_residual"}
    shapes = [[(n, p.shape) for n, p in network(d).encoder.named_parameters()] for d in DECODERS]
    assert shapes[0] == shapes[1]


# ---------------------------------------------------------------------------------------------------
# Text


def test_the_vocabulary_is_the_statements():
    assert nb.VOCABULARY == len(nb.TokenVectorizer.TOKENS) == 35
    assert set(nb.TokenVectorizer.TOKENS) == set("<>@# ,.?-abcdefghijklmnopqrstuvwxyz")
    special = [nb.TokenVectorizer.TOKENS[number] for number in (PAD, UNKNOWN, START, STOP)]
    assert special == ["@", "#", "<", ">"]
    names = nb.TokenVectorizer
    assert (names.PAD, names.UNKNOWN, names.START, names.STOP) == (PAD, UNKNOWN, START, STOP)


@given(st.text(alphabet=" ,.?-abcdefghijklmnopqrstuvwxyz", max_size=40))
def test_a_text_of_the_vocabulary_comes_back_as_it_was(text):
    vectorizer = nb.TokenVectorizer()
    tokens = vectorizer.encode(text)
    assert tokens[0] == START and tokens[-1] == STOP and len(tokens) == len(text) + 2
    assert min(tokens[1:-1], default=STOP + 1) > STOP
    assert vectorizer.decode(tokens) == vectorizer.decode([*tokens, PAD, PAD, 7]) == vectorizer.reference(text) == text


@settings(deadline=None)  # the first text of any alphabet takes seconds
@given(st.text(max_size=40), st.none() | st.integers(0, 50))
def test_any_text_becomes_its_lower_case_with_unknowns_marked_and_cut(text, limit):
    vectorizer = nb.TokenVectorizer(limit)
    known = set(" ,.?-abcdefghijklmnopqrstuvwxyz")
    expected = "".join(c if c in known else "#" for c in text.lower())[:limit]
    tokens = vectorizer.encode(text)
    assert vectorizer.decode(tokens) == vectorizer.reference(text) == expected
    assert tokens.count(START) == tokens.count(STOP) == 1 and PAD not in tokens and len(tokens) == len(expected) + 2


def test_special_characters_in_a_text_are_unknown_ones():
    vectorizer = nb.TokenVectorizer()
    assert vectorizer.encode("a<>@#É") == [START, 9, *[UNKNOWN] * 5, STOP]
    assert vectorizer.decode([START, 9, PAD, START, 10, STOP, 11]) == "ab"
    assert len(nb.TokenVectorizer(97).encode("x" * 200)) == 99


# ---------------------------------------------------------------------------------------------------
# Similarities


def random_pairs(count, seed=0):
    """Unlike strings, and strings with a few edits, swaps of neighbours and swaps around an insertion among them."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        letters = "abc" if number % 2 else "abcdefghij .,"
        first = "".join(rng.choice(list(letters), rng.integers(0, 16)))
        if number % 3 == 0:
            yield first, "".join(rng.choice(list(letters), rng.integers(0, 16)))
            continue
        second = list(first)
        for _ in range(rng.integers(0, 5)):
            place = int(rng.integers(0, len(second) + 1))
            letter, kind = str(rng.choice(list(letters))), rng.integers(4)
            if kind == 0:
                second.insert(place, letter)
            elif kind == 1:
                del second[place : place + 1]
            elif kind == 2:
                second[place : place + 2] = second[place : place + 2][::-1]
            else:  # 'ca' to 'abc': what the restricted distance does not see as a swap
                second[place : place + 2] = [*second[place + 1 : place + 2], letter, *second[place : place + 1]]
        yield first, "".join(second)


def true_damerau_levenshtein(a, b):
    """Lowrance and Wagner (1975): edits and swaps, where characters between two swapped ones may come and go."""
    costs = {}
    for i, j in itertools.product(range(len(a) + 1), range(len(b) + 1)):
        if i == 0 or j == 0:
            costs[i, j] = i + j
            continue
        options = [costs[i - 1, j] + 1, costs[i, j - 1] + 1, costs[i - 1, j - 1] + (a[i - 1] != b[j - 1])]
        k, m = a.rfind(b[j - 1], 0, i - 1) + 1, b.rfind(a[i - 1], 0, j - 1) + 1  # the swap's partners, from 1
        if k and m:
            options.append(costs[k - 1, m - 1] + (i - k - 1) + 1 + (j - m - 1))
        costs[i, j] = min(options)
    return costs[len(a), len(b)]


def test_similarities_are_textdistances_multiset_forms_and_both_edit_distances():
    published = {  # on lists of characters and without other libraries' answers
        "jaccard": textdistance.Jaccard(external=False),
        "cosine": textdistance.Cosine(external=False),
        "osa": textdistance.DamerauLevenshtein(external=False, restricted=True),
        "damerau_levenshtein": textdistance.DamerauLevenshtein(external=False, restricted=False),
    }
    differ = 0
    for first, second in random_pairs(3000):
        ours = nb.string_similarities(first, second)
        theirs = {name: form.normalized_similarity(list(first), list(second)) for name, form in published.items()}
        assert ours == pytest.approx(theirs, abs=1e-12), (first, second)
        distance = jellyfish.damerau_levenshtein_distance(first, second)
        assert distance == true_damerau_levenshtein(first, second)
        if first or second:
            assert ours["damerau_levenshtein"] == 1 - distance / max(len(first), len(second))
        differ += ours["osa"] != ours["damerau_levenshtein"]
    assert differ > 50  # else the pairs could not tell the two distances from each other


def test_damerau_levenshtein_is_the_shortest_way_by_single_edits():
    texts = ["".join(letters) for n in range(5) for letters in itertools.product("ab ", repeat=n)]
    chosen = set(texts[:40])

    def neighbours(text):
        for i in range(len(text) + 1):
            yield text[:i] + text[i + 1 :]
            yield text[:i] + text[i : i + 2][::-1] + text[i + 2 :]
            for letter in "ab ":
                yield text[:i] + letter + text[i + 1 :]
                yield text[:i] + letter + text[i:]

    for start in chosen:
        steps, queue = {start: 0}, collections.deque([start])
        while queue:
            text = queue.popleft()
            for new in neighbours(text):
                if len(new) <= 4 and new not in steps:
                    steps[new] = steps[text] + 1
                    queue.append(new)
        for end in chosen - {start, ""}:
            similarity = nb.string_similarities(start, end)["damerau_levenshtein"]
            assert similarity == 1 - steps[end] / max(len(start), len(end)), (start, end)


def test_what_the_similarities_see_and_what_they_are_blind_to():
    anagram = nb.string_similarities("listen", "silent")
    assert anagram["jaccard"] == anagram["cosine"] == 1 and anagram["damerau_levenshtein"] < 1
    swap = nb.string_similarities("ca", "abc")
    assert swap["damerau_levenshtein"] == 1 - 2 / 3 and swap["osa"] == 0
    assert nb.string_similarities("aab", "ab")["jaccard"] == 2 / 3  # of multisets; the sets are equal
    assert set(nb.string_similarities("", "").values()) == {1.0}
    for pair in (("", "abc"), ("abc", "")):
        assert set(nb.string_similarities(*pair).values()) == {0.0}


@given(st.text("abc ", max_size=8), st.text("abc ", max_size=8))
def test_similarities_are_symmetric_within_0_and_1_and_1_for_equal_texts(first, second):
    ours = nb.string_similarities(first, second)
    assert ours == pytest.approx(nb.string_similarities(second, first))
    assert all(0 <= value <= 1 for value in ours.values())
    assert (ours["damerau_levenshtein"] == 1) == (ours["osa"] == 1) == (first == second)


def test_scores_of_pairs_by_hand():
    references = ["the cat", "a dog ran", "no"]
    hypotheses = ["the cat", "a dig ran off", ""]
    scores = nb.score(references, hypotheses)
    assert scores["cer"] == (0 + 5 + 2) / (7 + 9 + 2)
    assert scores["wer"] == (0 + 2 + 1) / (2 + 3 + 1)
    assert scores["exact"] == pytest.approx(1 / 3)
    for name in ("jaccard", "cosine", "damerau_levenshtein", "osa"):
        pairs = zip(references, hypotheses, strict=True)
        assert scores[name] == pytest.approx(np.mean([nb.string_similarities(*pair)[name] for pair in pairs]))
    with pytest.raises(ValueError, match="zip"):
        nb.score(references, hypotheses[:2])


# ---------------------------------------------------------------------------------------------------
# Sound


def slaney_filters(rate, n_fft, n_mels):
    """[bins, n_mels]: Slaney's Auditory Toolbox, linear below 1 kHz, logarithmic above, each filter of unit area."""

    def to_hertz(mel):
        return mel * 200 / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)

    top = 15 + 27 * math.log(rate / 2 / 1000) / math.log(6.4)
    edges = [to_hertz(mel) for mel in np.linspace(0, top, n_mels + 2)]
    hertz = np.arange(n_fft // 2 + 1) * rate / n_fft
    filters = np.zeros((len(hertz), n_mels))
    for i, (low, middle, high) in enumerate(zip(edges, edges[1:], edges[2:], strict=False)):
        rising, falling = (hertz - low) / (middle - low), (high - hertz) / (high - middle)
        filters[:, i] = np.clip(np.minimum(rising, falling), 0, None) * 2 / (high - low)
    return filters


def log_mel_by_hand(samples, rate, n_fft, hop, n_mels):
    padded = np.pad(samples.astype(np.float64), n_fft // 2)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    frames = [padded[i : i + n_fft] * window for i in range(0, len(samples) + 1, hop)]
    power = np.abs(np.fft.rfft(frames)) ** 2
    return np.log(power @ slaney_filters(rate, n_fft, n_mels) + 1e-5)


@pytest.mark.parametrize(
    ("rate", "n_fft", "hop", "n_mels", "count"),
    [(22_050, 1024, 220, 80, 9000), (22_050, 1024, 256, 40, 300), (16_000, 400, 160, 20, 4001)],
)
def test_log_mel_against_numpy_and_torchaudio(rate, n_fft, hop, n_mels, count):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, count).astype(np.float32)
    ours = nb.LogMel(rate, n_fft, hop, n_mels)(torch.from_numpy(samples))
    assert ours.shape == (count // hop + 1, n_mels) and ours.dtype == torch.float32
    np.testing.assert_allclose(ours, log_mel_by_hand(samples, rate, n_fft, hop, n_mels), atol=2e-3)
    options = {"pad_mode": "constant", "norm": "slaney", "mel_scale": "slaney"}
    theirs = torchaudio.transforms.MelSpectrogram(rate, n_fft, hop_length=hop, n_mels=n_mels, **options)
    close(ours, (theirs(torch.from_numpy(samples)).T + 1e-5).log(), atol=1e-4)


@pytest.mark.parametrize("hertz", [440, 1000, 3000, 9000])
def test_a_tone_is_loudest_in_the_filter_that_names_its_frequency(hertz):
    log_mel = nb.LogMel(RATE)
    samples = torch.sin(2 * math.pi * hertz / RATE * torch.arange(RATE))
    loudest = log_mel(samples)[50].argmax().item()
    middles = log_mel.frequencies
    assert middles.shape == (80,) and (np.diff(middles) > 0).all()
    assert loudest == np.abs(middles - hertz).argmin()
    assert middles[-1] < RATE / 2 and middles[-1] > 10_000  # filters for 22,050 Hz, not for 16,000


def test_silence_stays_finite_and_single_samples_have_a_frame():
    log_mel = nb.LogMel(RATE)
    assert log_mel(torch.zeros(3000)).eq(math.log(1e-5)).all()
    assert log_mel(torch.ones(1)).shape == (1, 80)


def test_the_extractor_names_all_that_its_features_depend_on():
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 5000).astype(np.float32)
    base = tiny(n_mels=20)
    extract, about = nb.extractor(RATE, base)
    features = extract(samples, RATE)
    assert features.shape == (5000 // base.hop_length + 1, 20) and features.dtype == np.float32
    log_mel = nb.LogMel(RATE, base.n_fft, base.hop_length, base.n_mels)
    np.testing.assert_array_equal(features, log_mel(torch.from_numpy(samples)))
    assert nb.extractor(16_000, base)[1] != about
    for change in ({"n_mels": 21}, {"n_fft": 512}, {"hop_length": 99}, {"normalise_clips": True}):
        assert nb.extractor(RATE, nb.replace(base, **change))[1] != about
    assert nb.extractor(RATE, nb.replace(base, width=8, epochs=1, subsampling=2))[1] == about


def test_normalised_features_do_not_depend_on_loudness_and_colour():
    rng = np.random.default_rng(0)
    samples = (rng.normal(size=9000) * np.repeat(rng.uniform(0.1, 1, 90), 100)).astype(np.float32)
    extract, _ = nb.extractor(RATE, tiny(n_mels=20, normalise_clips=True))
    features = extract(0.1 * samples, RATE)
    np.testing.assert_allclose(features.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(extract(0.001 * samples, RATE), features, atol=1e-3)
    coloured = samples.copy()
    coloured[1:] += 0.8 * samples[:-1]  # a filter with little memory: high bands fall by the same amount in all frames
    changed = [np.abs(made(coloured, RATE) - made(samples, RATE))[5:-5].mean() for made in (extract, plain_extractor())]
    assert changed[0] < 0.3 < changed[1]
    assert np.isfinite(extract(np.zeros(3000, np.float32), RATE)).all()


def plain_extractor():
    return nb.extractor(RATE, tiny(n_mels=20))[0]


def test_the_mel_shift_moves_each_clip_by_its_own_part_of_a_band_in_training_alone():
    ramp = torch.arange(30.0).expand(200, 7, 30)  # each band holds its number
    shift = nb.MelShift(3.0)
    assert shift.eval()(ramp) is ramp and nb.MelShift(0.0).train()(ramp) is ramp
    torch.manual_seed(0)
    moved = shift.train()(ramp)
    inner = (moved - ramp)[:, :, 4:-4]  # where no end is near
    assert (inner - inner[:, :1, :1]).abs().max() < 1e-4  # all frames and bands of a clip by as much
    by = inner[:, 0, 0]
    assert -3 <= by.min() < -2.5 and 2.5 < by.max() <= 3 and len(by.unique()) == 200 and by.mean().abs() < 0.5
    assert moved.min() >= 0 and moved.max() <= 29  # the ends repeat their last band


def test_spec_augment_hides_bands_and_stretches_in_training_alone():
    augment = nb.SpecAugment()
    features = torch.rand(40, 600, 80) + 1.0
    lengths = torch.randint(100, 601, (40,))
    assert augment.eval()(features, lengths) is features
    torch.manual_seed(0)
    hidden = augment.train()(features, lengths) == 0
    bands, stretches = hidden.all(dim=1), hidden.all(dim=2)  # [B, 80], [B, 600]
    assert torch.equal(hidden, bands[:, None, :] | stretches[:, :, None])
    assert 0 < bands.sum(dim=1).float().mean() <= bands.sum(dim=1).max() <= 2 * 12
    assert 0 < stretches.sum(dim=1).float().mean() <= stretches.sum(dim=1).max() <= 2 * 15
    for clip, length in enumerate(lengths.tolist()):
        assert not stretches[clip, length:].any()  # a stretch beyond the end would hide nothing
    torch.manual_seed(0)
    assert torch.equal(augment(features, lengths), features.masked_fill(hidden, 0.0))
    assert not torch.equal(augment(features, lengths) == 0, hidden)  # each batch is hidden otherwise


# ---------------------------------------------------------------------------------------------------
# The network against the statement's formulas


def layer_norm(x, norm):
    centred = x - x.mean(dim=-1, keepdim=True)
    deviation = (centred.square().mean(dim=-1, keepdim=True) + norm.eps).sqrt()
    return centred / deviation * norm.weight + norm.bias


def attention_by_hand(attention, x, source, causal=False):
    """softmax(Q K' / sqrt(d)) V head by head, for one clip: [Q, width]"""
    outputs = []
    size = x.shape[1] // attention.heads
    for head in range(attention.heads):
        part = slice(head * size, (head + 1) * size)
        query, key, value = (
            inputs @ layer.weight[part].T + layer.bias[part]
            for inputs, layer in ((x, attention.query), (source, attention.key), (source, attention.value))
        )
        scores = query @ key.T / math.sqrt(size)
        if causal:
            scores = scores + torch.full_like(scores, -math.inf).triu(1)
        outputs.append(scores.exp() / scores.exp().sum(dim=1, keepdim=True) @ value)
    return torch.cat(outputs, dim=1) @ attention.output.weight.T + attention.output.bias


def residual_by_hand(residual, x, module, form):
    """LayerNorm(x + Module(LayerNorm(x))), or x + Module(LayerNorm(x))"""
    added = x + module(layer_norm(x, residual.norm_before))
    return layer_norm(added, residual.norm_after) if form == "statement" else added


def block_by_hand(block, x, form, source=None):
    """Attention to `source`, or to itself, then the feed-forward network"""

    def attend(y):
        return attention_by_hand(block.attention, y, y if source is None else source)

    def feed_forward(y):
        first, _, last = block.feed_forward
        hidden = y @ first.weight.T + first.bias
        gelu = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        return gelu @ last.weight.T + last.bias

    x = residual_by_hand(block.attention_residual, x, attend, form)
    return residual_by_hand(block.feed_forward_residual, x, feed_forward, form)


def positions_by_hand(count, width, rate=1.0):
    table = torch.zeros(count, width)
    for place, i in itertools.product(range(count), range(0, width, 2)):
        angle = place * rate / 10_000 ** (i / width)
        table[place, i], table[place, i + 1] = math.sin(angle), math.cos(angle)
    return table


def neighbours_by_hand(convolution, x):
    """Each feature's weighted sum over a place and its neighbours: [S, width] to [S, width]"""
    weights, reach = convolution.weight[:, 0, 0], convolution.weight.shape[3] // 2  # [width, places]
    out = convolution.bias.repeat(len(x), 1)
    for place, step in itertools.product(range(len(x)), range(-reach, reach + 1)):
        if 0 <= place + step < len(x):
            out[place] += weights[:, reach + step] * x[place + step]
    return out


def encoder_by_hand(encoder, audio, form):
    """One clip: [T, n_mels] to [S, width]"""
    x = (audio - encoder.feature_mean) / encoder.feature_std
    for convolution in encoder.convolutions:
        (size,), (stride,) = convolution.kernel_size, convolution.stride
        padded = F.pad(x, (0, 0, size // 2, size // 2))
        windows = [padded[i : i + size].T for i in range(0, len(x), stride)]  # [channels, size] each
        x = F.gelu(torch.stack([(convolution.weight * w).sum(dim=(1, 2)) + convolution.bias for w in windows]))
    if isinstance(encoder.norm, nn.LayerNorm):
        x = layer_norm(x, encoder.norm)
    x = x + positions_by_hand(len(x), x.shape[1], encoder.position_rate.item())
    for block in encoder.blocks:
        if block.local is not None:
            x = residual_by_hand(block.local_residual, x, lambda y, c=block.local: neighbours_by_hand(c, y), form)
        x = block_by_hand(block, x, form)
    return layer_norm(x, encoder.last_norm) if form == "pre-norm" else x


def decoder_by_hand(decoder, name, tokens, memory, form):
    """One clip: the logits after each of `tokens` [U], the whole text at once"""
    x = decoder.embedding.weight[tokens]
    if name == "lstm":
        x = layer_norm(x, decoder.embedding_norm)
        hidden = cell = torch.zeros(x.shape[1])
        outputs, lstm = [], decoder.lstm
        for row in x:
            gates = lstm.weight_ih_l0 @ row + lstm.bias_ih_l0 + lstm.weight_hh_l0 @ hidden + lstm.bias_hh_l0
            enter, keep, new, show = gates.chunk(4)
            cell = keep.sigmoid() * cell + enter.sigmoid() * new.tanh()
            hidden = show.sigmoid() * cell.tanh()
            outputs.append(hidden)
        x = torch.stack(outputs)
    else:
        x = x * math.sqrt(x.shape[1]) + positions_by_hand(len(x), x.shape[1])
        attention = decoder.self_attention
        x = residual_by_hand(decoder.self_residual, x, lambda y: attention_by_hand(attention, y, y, causal=True), form)
    x = layer_norm(block_by_hand(decoder.cross_block, x, form, memory), decoder.norm)
    return x @ decoder.output.weight.T + decoder.output.bias


@both_decoders
@both_forms
@pytest.mark.parametrize(("subsampling", "norm_positions", "local_kernel"), [(2, False, None), (4, True, 5)])
@torch.no_grad()
def test_the_network_is_the_statements(decoder, form, subsampling, norm_positions, local_kernel):
    changes = {"subsampling": subsampling, "norm_positions": norm_positions, "local_kernel": local_kernel}
    model = network(decoder, block_form=form, **changes)
    audio, lengths, text = random_batch([23])
    memory, mask = model.encoder(audio, lengths)
    assert mask.all() and memory.shape == (1, math.ceil(23 / subsampling), 16)
    close(memory[0], encoder_by_hand(model.encoder, audio[0], form))
    close(model(audio, lengths, text)[0], decoder_by_hand(model.decoder, decoder, text[0], memory[0], form))


@both_forms
def test_a_sub_block_norms_before_and_after_as_its_form_says(form):
    torch.manual_seed(0)
    residual = nb.Residual(tiny(block_form=form)).eval()
    x, module = torch.randn(2, 5, 16), nn.Linear(16, 16)
    close(residual(x, module), residual_by_hand(residual, x, module, form), atol=1e-6)
    spread = residual(100 * x, module).std(dim=2)
    assert (spread < 2).all() if form == "statement" else (spread > 20).all()


@pytest.mark.parametrize("kind", ["self", "cross", "padded", "causal", "any"])
def test_attention_is_torchs_own(kind):
    torch.manual_seed(0)
    ours, theirs = nb.MultiHeadAttention(24, 3), nn.MultiheadAttention(24, 3, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key.bias, ours.value.bias]).normal_())
        for layer, bias in zip((ours.query, ours.key, ours.value), theirs.in_proj_bias.chunk(3), strict=True):
            layer.bias.copy_(bias)
        theirs.out_proj.load_state_dict(ours.output.state_dict())
    x = torch.randn(4, 6, 24, requires_grad=True)
    source = torch.randn(4, 9, 24) if kind in ("cross", "padded") else x
    keys = source.shape[1]
    mask, options = torch.ones(6, keys, dtype=torch.bool), {}
    if kind == "padded":
        seen = nb.length_mask(torch.tensor([9, 1, 4, 7]), keys)
        mask, options = seen[:, None, None, :], {"key_padding_mask": ~seen}
    elif kind == "causal":
        mask = mask.tril()
        options = {"attn_mask": ~mask}
    elif kind == "any":
        mask = torch.rand(4, 3, 6, keys) < 0.5
        mask[..., 0] = True  # a row that sees nothing has no answer
        options = {"attn_mask": ~mask.flatten(0, 1)}
    expected, weights = theirs(x, source, source, average_attn_weights=False, **options)
    output = ours(x, source, mask)
    close(output, expected, atol=1e-6)
    close(ours.weights, weights, atol=1e-6)
    direction = torch.randn_like(output)
    gradients = [torch.autograd.grad((y * direction).sum(), x)[0] for y in (output, expected)]
    close(*gradients)


def test_sinusoids_are_those_of_the_paper_at_any_position():
    close(nb.sinusoids(torch.arange(50), 16), positions_by_hand(50, 16))
    close(nb.sinusoids(torch.arange(50) * 0.37, 16), positions_by_hand(50, 16, rate=0.37))


def test_length_masks():
    assert nb.length_mask(torch.tensor([2, 0, 3]), 3).tolist() == [[True, True, False], [False] * 3, [True] * 3]


# ---------------------------------------------------------------------------------------------------
# Padding and causality


@both_decoders
@both_forms
@pytest.mark.parametrize("subsampling", [2, 4])
@pytest.mark.parametrize("padding", [0.0, 1e4, math.nan, -math.inf])
@torch.no_grad()
def test_a_padded_batch_gives_each_clip_its_own_logits(decoder, form, subsampling, padding):
    model = network(decoder, block_form=form, subsampling=subsampling, kernel_size=5)
    audio, lengths, text = random_batch([37, 5, 50, 1, 42])
    audio[~nb.length_mask(lengths, 50)] = padding
    together = model(audio, lengths, text)
    assert together.shape == (5, 10, 35)
    for clip, length in enumerate(lengths.tolist()):
        alone = model(audio[clip : clip + 1, :length], lengths[clip : clip + 1], text[clip : clip + 1])
        close(together[clip], alone[0])


def test_padding_gets_no_gradient_and_training_with_spec_augment_survives_it():
    model = network("lstm", spec_augment=True, n_mels=60).train()
    audio, lengths, text = random_batch([90, 42], mels=60)
    audio[1, 42:] = math.nan
    audio.requires_grad_()
    model(audio, lengths, text).sum().backward()
    assert audio.grad[1, 42:].eq(0).all() and audio.grad[1, :42].ne(0).any()
    assert all(p.grad.isfinite().all() for p in model.decoder.parameters())


@both_decoders
@torch.no_grad()
def test_no_output_sees_a_later_token(decoder):
    model = network(decoder)
    audio, lengths, text = random_batch([40])
    logits = model(audio, lengths, text)
    for place in range(1, text.shape[1]):
        changed = text.clone()
        changed[0, place] = UNKNOWN
        others = model(audio, lengths, changed)
        assert torch.equal(others[:, :place], logits[:, :place]), place
        assert (others[:, place:] - logits[:, place:]).abs().amax(dim=2).gt(1e-4).all(), place


# ---------------------------------------------------------------------------------------------------
# Decoding


@both_decoders
@both_forms
@pytest.mark.parametrize("sizes", [[1] * 10, [3, 1, 4, 2], [9, 1]])
@torch.no_grad()
def test_decoding_in_steps_is_teacher_forcing(decoder, form, sizes):
    model = network(decoder, block_form=form)
    audio, lengths, text = random_batch([40, 13, 27])
    memory = model.encoder(audio, lengths)
    state, outputs = model.decoder.start(*memory), []
    for tokens in text.split(sizes, dim=1):
        logits, state = model.decoder.step(tokens, state)
        outputs.append(logits)
    close(torch.cat(outputs, dim=1), model(audio, lengths, text))


@both_decoders
@torch.no_grad()
def test_selected_rows_go_on_as_if_they_were_alone(decoder):
    model = network(decoder)
    audio, lengths, text = random_batch([40, 13, 27])
    whole = model(audio, lengths, text)
    _, state = model.decoder.step(text[:, :4], model.decoder.start(*model.encoder(audio, lengths)))
    for rows in (torch.tensor([2, 0]), torch.tensor([False, True, False]), torch.tensor([1, 1, 1, 0])):
        logits, later = model.decoder.step(text[rows, 4:6], state.select(rows))
        close(logits, whole[rows, 4:6])
        logits, _ = model.decoder.step(text[rows, 6:], later)
        close(logits, whole[rows, 6:])
    fresh = model.decoder.start(*model.encoder(audio, lengths)).select(torch.tensor([1]))
    close(model.decoder.step(text[1:2], fresh)[0], whole[1:2])


def talkative(decoder, stop_bias, seed=0):
    """A random network that writes varied texts of varied lengths."""
    model = network(decoder, seed)
    with torch.no_grad():
        model.decoder.output.weight.mul_(8)
        model.decoder.output.bias[STOP] += stop_bias
        model.decoder.output.bias[[PAD, START]] -= 100.0
    return model


@torch.no_grad()
def greedy_by_hand(model, audio, max_tokens):
    """One clip [T, n_mels]; the network reads the whole text again for each new token."""
    tokens = []
    for _ in range(max_tokens):
        logits = model(audio[None], torch.tensor([len(audio)]), torch.tensor([[START, *tokens]]))[0, -1]
        first, second = logits.topk(2).values.tolist()
        assert first - second > 1e-3, "too close for a comparison of tokens: another seed"
        if logits.argmax() == STOP:
            break
        tokens.append(logits.argmax().item())
    return tokens


CLIPS = [80, 23, 61, 7, 44, 52, 16, 70]  # frames
STOP_BIAS = {"lstm": 3.0, "transformer": 3.0}


def longest_text(frames):
    """20 characters a second and 10, at 220 samples a frame"""
    return int(20 * frames * 220 / RATE) + 10


@both_decoders
@pytest.mark.parametrize("max_tokens", [None, 6, 1])
def test_greedy_decoding_of_a_batch_is_that_of_each_clip_by_the_whole_prefix(decoder, max_tokens):
    model = talkative(decoder, STOP_BIAS[decoder])
    audio, lengths, _ = random_batch(CLIPS)
    ours = model.generate(audio, lengths, max_tokens)
    limits = [longest_text(length) if max_tokens is None else max_tokens for length in CLIPS]
    for clip, (length, limit) in enumerate(zip(CLIPS, limits, strict=True)):
        assert ours[clip] == greedy_by_hand(model, audio[clip, :length], limit), clip
    counts = list(map(len, ours))
    if max_tokens is None:  # early stops at several places, and a clip that has to be stopped
        assert len(set(counts)) >= 4 and any(n == limit for n, limit in zip(counts, limits, strict=True)), counts
    assert max(counts) <= max(limits)


@torch.no_grad()
def greedy_through_a_window(model, audio, max_tokens, ahead, behind):
    """One clip [T, n_mels], the whole text read anew for each token, under a mask [U, S] of what each may look at.

    Also returns the furthest place after each token.
    """
    memory, mask = model.encoder(audio[None], torch.tensor([len(audio)]))
    attention, positions = model.decoder.cross_block.attention, torch.arange(memory.shape[1])
    start = model.decoder.start(memory, mask)
    tokens, furthest = [], [0]
    for _ in range(max_tokens):
        sees = [(positions >= place - behind) & (positions <= place + ahead) for place in furthest]
        masked = nb.replace(start, memory_mask=torch.stack(sees)[None, None])
        logits = model.decoder.step(torch.tensor([[START, *tokens]]), masked)[0][0, -1]
        looked = attention.weights[0, :, -1].mean(dim=0)
        assert looked[~sees[-1]].eq(0).all()
        furthest.append(max(furthest[-1], looked.argmax().item()))
        if logits.argmax() == STOP:
            break
        tokens.append(logits.argmax().item())
    return tokens, furthest


@both_decoders
def test_decoding_sees_a_window_that_moves_forward_alone(decoder):
    model = talkative(decoder, STOP_BIAS[decoder])
    audio, lengths, _ = random_batch(CLIPS)
    everything = model.generate(audio, lengths)
    second = RATE / 220 / 4  # positions
    for seconds in (0.1, 0.2, 60.0):
        model.settings = nb.replace(model.settings, attention_window=seconds)
        ours = model.generate(audio, lengths)
        ahead = round(seconds * second)
        for clip, length in enumerate(CLIPS):
            expected, furthest = greedy_through_a_window(
                model, audio[clip, :length], longest_text(length), ahead, ahead // 4
            )
            assert ours[clip] == expected, (seconds, clip)
            assert all(0 <= after - before <= ahead for before, after in itertools.pairwise(furthest))
        assert (ours == everything) == (seconds == 60.0)


@both_decoders
def test_a_clip_that_stops_at_once_has_an_empty_text(decoder):
    model = talkative(decoder, stop_bias=1e4)
    audio, lengths, _ = random_batch([30, 10])
    assert model.generate(audio, lengths) == [[], []]
    assert nb.beam_search(model, audio[0])[0][0] == []


# ---------------------------------------------------------------------------------------------------
# Beam search and CTC


@torch.no_grad()
def beam_by_hand(model, audio, width, margin):
    """The same search over plain lists, the whole prefix again for every text."""
    length = torch.tensor([len(audio)])
    beam, finished = [([], 0.0)], []
    for _ in range(longest_text(len(audio)) + 1):
        longer = []
        for tokens, value in beam:
            logits = model(audio[None], length, torch.tensor([[START, *tokens]]))[0, -1]
            for token, more in enumerate(logits.log_softmax(dim=0).tolist()):
                longer.append(([*tokens, token], value + more))
        longer = sorted(longer, key=lambda text: -text[1])[:width]
        finished += [(tokens[:-1], value) for tokens, value in longer if tokens[-1] == STOP]
        beam = [text for text in longer if text[0][-1] != STOP]
        best = max([value / (len(tokens) + 1) for tokens, value in finished], default=-math.inf)
        if not beam or beam[0][1] / len(beam[0][0]) < best - margin:
            break
    unfinished = [(beam[0][0][: longest_text(len(audio))], beam[0][1])] if not finished else []
    return sorted(finished or unfinished, key=lambda text: -text[1] / (len(text[0]) + 1))[:width]


@both_decoders
@pytest.mark.parametrize(("width", "margin"), [(2, 0.1), (5, 0.1), (5, 0.0)])
def test_beam_search_finds_what_a_search_over_plain_lists_finds(decoder, width, margin):
    model = talkative(decoder, STOP_BIAS[decoder])
    audio, _, _ = random_batch(CLIPS)
    counts = set()
    for clip in (3, 6, 1):
        heard = audio[clip, : CLIPS[clip]]
        ours, expected = nb.beam_search(model, heard, width, margin), beam_by_hand(model, heard, width, margin)
        assert [tokens for tokens, _ in ours] == [tokens for tokens, _ in expected], clip
        assert [value for _, value in ours] == pytest.approx([value for _, value in expected], abs=1e-3)
        counts.add(len(ours))
    assert max(counts) <= width


class Reader:
    """A decoder that is sure of its text, but for the probability that label smoothing leaves every other token."""

    def __init__(self, text):
        self.tokens = [*text, STOP]

    def start(self, audio, audio_lengths):
        return SimpleNamespace(place=torch.zeros(1, dtype=int), select=None)

    def step(self, tokens, state):
        logits = torch.full((len(tokens), 1, 35), 0.1 / 35)
        logits[:, 0, self.tokens[min(int(state.place[0]), len(self.tokens) - 1)]] = 0.9
        later = SimpleNamespace(place=state.place + 1)
        later.select = lambda rows: later
        return logits.log(), later


def test_a_beam_reads_a_long_text_to_its_end():
    text = [5, 6, 7, 8] * 40
    decoder = Reader(text)
    model = SimpleNamespace(start=decoder.start, decoder=decoder)
    model.longest_text = lambda lengths: torch.full_like(lengths, 200)
    assert nb.beam_search(model, torch.zeros(1, 1))[0][0] == text


def test_a_beam_ends_when_what_goes_on_is_far_worse_than_what_is_finished(monkeypatch):
    monkeypatch.setattr(nb, "VOCABULARY", 4)
    steps = {}
    for margin in (0.0, math.inf):
        counts, best = [], []
        for seed in range(8):
            decoder = Bigrams(seed)
            model = SimpleNamespace(start=decoder.start, decoder=decoder)
            model.longest_text = lambda lengths: torch.full_like(lengths, 10)
            step = decoder.step
            decoder.step = lambda *given, step=step, counts=counts: counts.append(1) or step(*given)
            best.append(max(map(nb.per_token, nb.beam_search(model, torch.zeros(1, 1), width=3, margin=margin))))
        steps[margin] = len(counts), best
    assert steps[0.0][0] < steps[math.inf][0]
    assert all(short <= long + 1e-6 for short, long in zip(steps[0.0][1], steps[math.inf][1], strict=True))


@both_decoders
def test_a_beam_of_one_is_greedy(decoder):
    model = talkative(decoder, STOP_BIAS[decoder])
    audio, lengths, _ = random_batch(CLIPS)
    for clip, length in enumerate(CLIPS):
        (greedy,) = model.generate(audio[clip : clip + 1, :length], lengths[clip : clip + 1])
        ((tokens, _),) = nb.beam_search(model, audio[clip, :length], width=1)
        assert tokens == greedy


@torch.no_grad()
def test_what_a_beam_found_is_ranked_by_decoder_and_ctc_together():
    model = network("transformer")
    audio, lengths, _ = random_batch([40])
    memory, _ = model.encoder(audio, lengths)
    heard = model.ctc(memory).log_softmax(dim=2).transpose(0, 1)
    texts = [[5, 6, 7], [8], [], [5, 5, 6, 7, 8, 9, 10, 11], [30, 31, 30, 31]]
    found = list(zip(texts, [-9.0, -7.0, -6.5, -8.0, -7.5], strict=True))
    best = set()
    for weight in (0.0, 0.1, 0.3, 0.7, 1.0):

        def joint(pair, weight=weight):
            text, value = torch.tensor(pair[0], dtype=torch.long), pair[1]
            cost = F.ctc_loss(heard, text[None], [len(heard)], [len(text)], reduction="sum").item()
            return (1 - weight) * value - weight * cost

        best.add(expected := texts.index(max(found, key=joint)[0]))
        assert nb.rank_with_ctc(model, audio[0], found, weight) == texts[expected]
    assert 2 in best and len(best) > 1


class Bigrams:
    """A decoder over four tokens, the last of which is the stop, that looks at the last token and the place alone."""

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        self.table = 2 * torch.randn(12, 4, 4, generator=generator)  # [place, token, next token]

    def start(self, audio, audio_lengths):
        return SimpleNamespace(place=0, select=lambda rows: SimpleNamespace(place=0))

    def step(self, tokens, state):
        later = SimpleNamespace(place=state.place + 1)
        later.select = lambda rows: later
        return self.table[state.place][tokens], later

    def log_probability(self, tokens):
        """Of a finished text."""
        pairs = itertools.pairwise([START, *tokens, STOP])
        return sum(self.table[i, a].log_softmax(dim=0)[b].item() for i, (a, b) in enumerate(pairs))


def test_a_beam_that_holds_every_text_finds_all_and_greedy_never_beats_the_best(monkeypatch):
    monkeypatch.setattr(nb, "VOCABULARY", 4)
    audio = torch.zeros(1, 1)
    beaten = 0
    for seed in range(8):
        decoder = Bigrams(seed)
        model = SimpleNamespace(start=decoder.start, decoder=decoder)
        model.longest_text = lambda lengths: torch.full_like(lengths, 6)
        found = nb.beam_search(model, audio, width=4**7, margin=math.inf)
        every = [list(tokens) for n in range(7) for tokens in itertools.product(range(3), repeat=n)]
        expected = {tuple(tokens): decoder.log_probability(tokens) for tokens in every}
        assert {tuple(tokens): value for tokens, value in found} == pytest.approx(expected, abs=1e-4)
        ranks = [value / (len(tokens) + 1) for tokens, value in found]
        assert ranks == sorted(ranks, reverse=True)
        ((narrow, value),) = nb.beam_search(model, audio, width=1)
        if len(narrow) < 6:  # it stopped by itself
            assert ranks[0] >= value / (len(narrow) + 1) - 1e-5
            beaten += ranks[0] > value / (len(narrow) + 1) + 1e-5
    assert beaten  # else the tables were too easy


def collapse(path):
    """CTC's map: repeats merged, blanks dropped."""
    return [token for token, _ in itertools.groupby(path) if token != PAD]


def test_ctc_transcripts_merge_repeats_and_drop_blanks():
    paths = [[5, 5, 0, 5, 6, 6, 0, 0], [0, 0, 7, 7, 7, 8, 8, 8], [9, 0, 9, 9, 4, 4, 4, 4]]
    lengths = torch.tensor([8, 8, 3])
    hears = F.one_hot(torch.tensor(paths), nb.VOCABULARY).float()
    model = SimpleNamespace(encoder=lambda audio, n: (audio, nb.length_mask(n, 8)), ctc=lambda memory: memory)
    assert nb.ctc_transcript(model, hears, lengths) == [[5, 5, 6], [7, 8], [9, 9]]


def test_ctc_transcripts_of_a_batch_are_those_of_each_clip():
    model = network("lstm")
    audio, lengths, _ = random_batch([80, 23, 61])
    for clip, ours in enumerate(nb.ctc_transcript(model, audio, lengths)):
        alone = model.encoder(audio[clip : clip + 1, : lengths[clip]], lengths[clip : clip + 1])[0]
        assert ours == collapse(model.ctc(alone)[0].argmax(dim=1).tolist())


@pytest.mark.parametrize("text", [[5], [5, 6], [5, 5], [4, 5, 4], [5, 5, 6]])
def test_ctc_alignments_are_the_likeliest_of_all_paths(text):
    for seed in range(6):
        log_probabilities = torch.randn(6, nb.VOCABULARY, generator=torch.Generator().manual_seed(seed)).log_softmax(1)
        paths = (p for p in itertools.product([PAD, *set(text)], repeat=6) if collapse(p) == text)
        best = max(paths, key=lambda path: sum(log_probabilities[i, token].item() for i, token in enumerate(path)))
        runs = [(token, [i for i, _ in run]) for token, run in itertools.groupby(enumerate(best), lambda pair: pair[1])]
        expected = [(places[0], places[-1]) for token, places in runs if token != PAD]
        assert nb.ctc_alignment(log_probabilities, text) == expected


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(STOP + 1, 34), max_size=12), st.integers(0, 12), st.integers(0, 99))
def test_ctc_alignments_have_a_span_for_each_token_in_order(text, spare, seed):
    needed = len(text) + sum(a == b for a, b in itertools.pairwise(text))
    size = max(1, needed + spare)
    log_probabilities = torch.randn(size, 35, generator=torch.Generator().manual_seed(seed)).log_softmax(dim=1)
    spans = nb.ctc_alignment(log_probabilities, text)
    edges = [place for span in spans for place in span]
    assert len(spans) == len(text) and edges == sorted(edges) and all(0 <= place < size for place in edges)
    for (a, b), (left, right) in zip(itertools.pairwise(text), itertools.pairwise(spans), strict=True):
        assert right[0] - left[1] >= 1 + (a == b)  # between equal tokens lies a blank


def test_too_few_positions_for_ctc_are_said_in_one_line():
    log_probabilities = torch.zeros(4, 35).log_softmax(dim=1)
    assert len(nb.ctc_alignment(log_probabilities, [5, 6, 7, 8])) == 4
    for text in ([5, 6, 7, 8, 9], [5, 5, 6, 7]):
        with pytest.raises(InputError, match=r"^4 positions are too few for CTC: this text needs 5$"):
            nb.ctc_alignment(log_probabilities, text)


# ---------------------------------------------------------------------------------------------------
# Losses


TEXTS = ["a dog.", "the hen, a cat?", "too", "ca"]
FRAMES = [60, 90, 41, 12]


def loss_batch():
    audio, lengths, _ = random_batch(FRAMES)
    encoded = [torch.tensor(nb.TokenVectorizer().encode(text)) for text in TEXTS]
    return audio, lengths, nn.utils.rnn.pad_sequence(encoded, batch_first=True, padding_value=PAD)


def losses_by_hand(model, smoothing, audio, text, guided):
    """Of one clip [T, n_mels] and its tokens, without padding."""
    length, tokens = torch.tensor([len(audio)]), torch.tensor([text])
    heard = model(audio[None], length, tokens[:, :-1])[0].log_softmax(dim=1)
    right = -heard[range(len(text) - 1), text[1:]].sum()
    cross_entropy = (1 - smoothing) * right - smoothing * heard.mean(dim=1).sum()
    weights = model.decoder.cross_block.attention.weights[0].mean(dim=0)  # [U, S]
    memory, _ = model.encoder(audio[None], length)
    positions = model.ctc(memory)[0].log_softmax(dim=1)
    ctc = F.ctc_loss(positions[:, None], tokens[:, 1:-1], [len(positions)], [len(text) - 2], reduction="sum")
    guide = torch.zeros(())
    if guided:
        last = len(positions) - 1
        spans = [*nb.ctc_alignment(positions.detach(), text[1:-1]), (last - 1, last)]
        for row, (first, end) in zip(weights, spans, strict=True):
            guide = guide - (row[max(0, first - nb.GUIDE_MARGIN) : end + nb.GUIDE_MARGIN + 1].sum() + 1e-4).log()
    return torch.stack([cross_entropy, ctc, guide])


@both_decoders
@pytest.mark.parametrize("guided", [False, True])
def test_the_loss_of_a_batch_is_the_sum_over_its_clips(decoder, guided):
    model = network(decoder, subsampling=2)
    objective = nb.Objective(model, tiny(label_smoothing=0.1))
    audio, lengths, text = loss_batch()
    ours = objective(audio, lengths, text, guided)
    tokens = [nb.TokenVectorizer().encode(t) for t in TEXTS]
    clips = zip(audio, FRAMES, tokens, strict=True)
    expected = sum(losses_by_hand(model, 0.1, a[:n], t, guided) for a, n, t in clips)
    close(ours, expected, atol=2e-4)
    assert ours[:2].gt(1).all() and (ours[2] > 0) == guided


def test_text_dropout_hides_its_share_of_the_characters_in_training_alone():
    objective = nb.Objective(network("lstm"), tiny(text_dropout=0.25))
    text = random_batch([8] * 40, characters=100)[2]
    text[:, -20:] = PAD
    hidden = objective.train().hide_some(text)
    changed = hidden != text
    assert (hidden[changed] == UNKNOWN).all() and not changed[:, 0].any() and not changed[:, -20:].any()
    assert changed[:, 1:-20].float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(objective.eval().hide_some(text), text)
    assert torch.equal(nb.Objective(network("lstm"), tiny()).train().hide_some(text), text)


def test_more_padding_changes_no_loss():
    objective = nb.Objective(network("transformer"), tiny())
    audio, lengths, text = loss_batch()
    longer = F.pad(audio, (0, 0, 0, 30), value=7.0), lengths, F.pad(text, (0, 11), value=PAD)
    for guided in (False, True):
        close(objective(*longer, guided), objective(audio, lengths, text, guided), atol=1e-4)


def test_without_a_ctc_layer_there_is_cross_entropy_alone():
    settings = tiny(ctc_weight=0.0, label_smoothing=0.0)
    model = network("lstm", ctc_weight=0.0)
    losses = nb.Objective(model, settings)(*loss_batch(), True)
    assert model.ctc is None and losses[0] > 0 and losses[1:].tolist() == [0, 0]


def test_a_clip_too_short_for_ctc_counts_in_the_cross_entropy_alone():
    model = network("transformer")
    objective = nb.Objective(model, tiny())
    audio, lengths, _ = random_batch([40, 6])  # ten and two positions
    text = nn.utils.rnn.pad_sequence(
        [torch.tensor(nb.TokenVectorizer().encode(t)) for t in ("a cat", "a cat")], batch_first=True
    )
    together = objective(audio, lengths, text, True)
    first = objective(audio[:1], lengths[:1], text[:1], True)
    close(together[1:], first[1:], atol=1e-4)
    assert together[0] > first[0] + 1
    together.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_the_guide_pulls_the_attention_and_not_the_ctc_layer():
    model = network("lstm")
    loss = nb.Objective(model, tiny())(*loss_batch(), True)
    query = model.decoder.cross_block.attention.query
    of_ctc, of_query = torch.autograd.grad(loss[2], [model.ctc.weight, query.weight])
    assert of_ctc.eq(0).all() and of_query.abs().sum() > 0.01


def test_guide_targets_lie_around_the_place_of_each_character():
    path = [0, 0, 5, 5, 0, 0, 0, 6, 0, 0, 0, 0]
    sure = (20.0 * F.one_hot(torch.tensor([path, path]), 35).float()).log_softmax(dim=2)
    text = torch.tensor([[5, 6, STOP, PAD], [5, STOP, PAD, PAD]])
    target = nb.guide_target(sure, torch.tensor([12, 4]), text, torch.tensor([2, 1]))
    places = [[row.nonzero().flatten().tolist() for row in clip] for clip in target]
    margin = nb.GUIDE_MARGIN

    def around(first, last):
        return [*range(max(0, first - margin), min(12, last + margin + 1))]

    assert places[0] == [around(2, 3), around(7, 7), around(10, 11), []]
    assert places[1][0] == around(2, 3) and set(places[1][1]) >= {2, 3} and places[1][2:] == [[], []]


# ---------------------------------------------------------------------------------------------------
# Batches and learning rate


class Cache(dict):
    """Features by row of a clip."""

    def __getitem__(self, clip):
        return super().__getitem__(clip.row)

    def frames(self, clip):
        return len(self[clip])


def fake_clips(frames, texts, mels=12):
    rng = np.random.default_rng(0)
    clips = [utils.Clip(i, f"C{i}", text, ROOT / "none.wav", 1.0, RATE, "") for i, text in enumerate(texts)]
    return clips, Cache({i: rng.normal(size=(n, mels)).astype(np.float16) for i, n in enumerate(frames)})


def test_a_batch_is_padded_and_keeps_its_order():
    clips, cache = fake_clips([5, 9, 1], ["Ab", "c", "d, e!"])
    audio, lengths, text = nb.collate(clips, cache, nb.TokenVectorizer(), "cpu")
    assert audio.shape == (3, 9, 12) and audio.dtype == torch.float32 and lengths.tolist() == [5, 9, 1]
    for i, clip in enumerate(clips):
        np.testing.assert_array_equal(audio[i, : lengths[i]], cache[clip].astype(np.float32))
        assert audio[i, lengths[i] :].eq(0).all()
    vectorizer = nb.TokenVectorizer()
    assert [[t for t in row if t != PAD] for row in text.tolist()] == [vectorizer.encode(c.text) for c in clips]


def test_transcripts_come_in_the_order_of_the_clips_whatever_the_batches():
    model = talkative("transformer", STOP_BIAS["transformer"])
    clips, cache = fake_clips(CLIPS, ["x"] * len(CLIPS))
    texts = nb.transcripts(model, clips, cache)
    for clip, text in zip(clips, texts, strict=True):
        audio = torch.from_numpy(cache[clip].astype(np.float32))[None]
        (alone,) = model.generate(audio, torch.tensor([audio.shape[1]]))
        assert text == model.vectorizer.decode(alone)
    assert len(set(texts)) > 4
    batches = nb.in_batches(clips, cache, 3)
    assert [cache.frames(clip) for batch in batches for clip in batch] == sorted(CLIPS)
    assert list(map(len, batches)) == [3, 3, 2]


def test_mean_loss_is_per_token_over_all_clips():
    model = network("lstm", dropout=0.5, spec_augment=True)
    objective = nb.Objective(model, tiny()).train()
    clips, cache = fake_clips(FRAMES, TEXTS)
    ours = nb.mean_loss(objective, clips, cache)
    tokens = sum(len(text) + 1 for text in TEXTS)
    expected = objective.eval()(*nb.collate(clips, cache, model.vectorizer, "cpu"))[:2] / tokens
    assert ours == pytest.approx({"loss": expected[0].item(), "ctc_loss": expected[1].item()}, rel=1e-5)


@pytest.mark.parametrize("subsampling", [2, 4])
def test_clips_with_too_few_positions_for_ctc_are_those_whose_loss_is_infinite(subsampling):
    # "too, all?" needs eleven positions, "a cat" five
    frames = [subsampling * n + more for n in (9, 10) for more in (0, 1)] + [subsampling * 4, subsampling * 4 + 1]
    clips, cache = fake_clips(frames, ["too, all?"] * 4 + ["a cat"] * 2)
    model = network("lstm", subsampling=subsampling)
    infinite = 0
    for clip in clips:
        audio, lengths, text = nb.collate([clip], cache, model.vectorizer, "cpu")
        memory, mask = model.encoder(audio, lengths)
        heard = model.ctc(memory).log_softmax(dim=2).transpose(0, 1)
        infinite += F.ctc_loss(heard, text[:, 1:-1], mask.sum(1), torch.tensor([text.shape[1] - 2])).isinf().item()
    assert nb.too_short_for_ctc(clips, cache, tiny(subsampling=subsampling)) == infinite
    assert infinite == 4


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 900), min_size=1, max_size=70), st.integers(1, 20), st.integers(0, 5), st.booleans())
def test_every_epoch_has_each_clip_once(lengths, size, epoch, bucketing):
    lengths, chosen = np.array(lengths), tiny(batch_size=size, bucketing=bucketing)
    batches = nb.make_batches(lengths, chosen, 3, epoch)
    assert sorted(np.concatenate(batches).tolist()) == [*range(len(lengths))]
    sizes = list(map(len, batches))
    assert len(sizes) == math.ceil(len(lengths) / size) and 1 <= min(sizes) <= max(sizes) <= size
    np.random.seed(1)  # noqa: NPY002 (the global state must not matter)
    again = nb.make_batches(lengths, chosen, 3, epoch)
    assert [b.tolist() for b in again] == [b.tolist() for b in batches]


def test_epochs_and_seeds_differ_and_buckets_hold_clips_of_like_length():
    lengths = np.random.default_rng(0).integers(100, 900, 200)
    waste = {}
    for bucketing in (False, True):
        chosen = tiny(batch_size=10, bucketing=bucketing)
        orders = [np.concatenate(nb.make_batches(lengths, chosen, s, e)).tolist() for s in (1, 2) for e in (0, 1, 2)]
        assert len(set(map(tuple, orders))) == 6
        batches = nb.make_batches(lengths, chosen, 1, 1)
        waste[bucketing] = sum(lengths[b].max() * len(b) for b in batches) / lengths.sum() - 1
    assert waste[True] < 0.2 < waste[False]
    means = [[lengths[b].mean() for b in nb.make_batches(lengths, chosen, 1, epoch)] for epoch in (0, 1)]
    assert np.corrcoef(means[0], range(20))[0, 1] > 0.98  # short clips first
    assert abs(np.corrcoef(means[1], range(20))[0, 1]) < 0.6


def test_the_learning_rate_warms_up_and_falls_to_two_percent():
    chosen = tiny(learning_rate=3e-3, warmup_steps=20, cosine=True)
    rates = np.array([nb.learning_rate(step, 400, chosen) for step in range(401)])
    assert rates[0] == pytest.approx(3e-3 / 20) and rates[400] == pytest.approx(0.02 * 3e-3)
    assert (np.diff(rates[:20]) > 0).all() and (np.diff(rates[20:]) < 0).all()
    assert 0.98 * 3e-3 < rates.max() <= 3e-3 and rates[19] == rates.max()
    assert rates[200] == pytest.approx(0.51 * 3e-3, rel=0.06)
    plain = nb.replace(chosen, cosine=False)
    assert nb.learning_rate(9, 400, plain) == pytest.approx(3e-3 / 2)
    assert nb.learning_rate(19, 400, plain) == nb.learning_rate(399, 400, plain) == 3e-3
    homework = nb.PRESETS["homework"]
    assert {nb.learning_rate(step, 400, homework) for step in range(400)} == {1e-3}


# ---------------------------------------------------------------------------------------------------
# Long recordings


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.floats(0.5, 3.0), st.integers(0, 9))
def test_the_pieces_of_a_recording_without_pauses_cover_it_and_none_is_too_long(count, longest, seed):
    rate = 200
    samples = np.random.default_rng(seed).uniform(-1, 1, count).astype(np.float32)
    pieces = asr.split_at_silences(samples, rate, longest)
    assert pieces[0][0] == 0 and pieces[-1][1] == count
    assert all(end == first for (_, end), (first, _) in itertools.pairwise(pieces))
    assert all(0 < end - first <= longest * rate for first, end in pieces)


def in_a_row(parts, rate, noise):
    """Loud noise and pauses by turns, in seconds, over weak noise; first and last sample of what is loud."""
    rng = np.random.default_rng(0)
    counts = [int(seconds * rate) for seconds in parts]
    ends = np.cumsum(counts)
    samples = rng.normal(0, noise, ends[-1])
    loud = [(end - count, end) for end, count in zip(ends[::2], counts[::2], strict=True)]
    for first, last in loud:
        samples[first:last] += rng.normal(0, 0.2, last - first)
    return samples.astype(np.float32), loud


@pytest.mark.parametrize("noise", [0.0, 1e-4, 2e-3])
@pytest.mark.parametrize("rate", [8_000, 22_050])
def test_a_recording_is_cut_at_its_pauses_and_only_there(rate, noise):
    samples, loud = in_a_row((3.1, 0.5, 2.7, 0.35, 4.4, 0.2, 0.1, 1.0, 0.05, 0.6, 2.2), rate, noise)
    pieces = asr.split_at_silences(samples, rate, 10.0)
    expected = [loud[0], loud[1], (loud[2][0], loud[3][1]), loud[4], loud[5]]  # a fifth of a second is no pause
    margin = 0.1 * rate
    assert len(pieces) == len(expected)
    for (first, last), (began, ended) in zip(pieces, expected, strict=True):
        assert first <= began and last >= ended  # nothing said is lost
        for kept in (began - first, last - ended):
            assert kept == 0 or 0.7 * margin < kept < 1.3 * margin


@pytest.mark.parametrize("rate", [8_000, 22_050])
def test_long_silence_before_and_after_is_left_out(rate):
    samples, _ = in_a_row((1.5,), rate, 1e-4)
    silence = np.random.default_rng(1).normal(0, 1e-4, 3 * rate).astype(np.float32)
    ((first, last),) = asr.split_at_silences(np.concatenate([silence, samples, silence]), rate)
    assert 0 <= 3 * rate - first < 0.12 * rate and 0 <= last - 4.5 * rate < 0.12 * rate
    assert asr.split_at_silences(np.zeros(rate, np.float32), rate) == []


@pytest.mark.parametrize("rate", [8_000, 22_050])
def test_what_is_long_without_a_pause_is_cut_where_it_is_quietest(rate):
    parts = [part for seconds in (3.1, 2.7, 4.4, 3.6, 2.2, 3.9, 4.8) for part in (seconds, 0.2)]
    samples, loud = in_a_row((*parts, 3.3), rate, 1e-4)
    pieces = asr.split_at_silences(samples, rate, 10.0)
    assert len(pieces) > 3
    for _, cut in pieces[:-1]:
        assert any(end <= cut <= first for (_, end), (first, _) in itertools.pairwise(loud)), cut / rate


# ---------------------------------------------------------------------------------------------------
# What the results are shown with


@settings(deadline=None)
@given(st.text("ab<&\"' .", max_size=16), st.text("ab<&\"' .", max_size=16))
def test_marked_words_hold_both_texts(reference, hypothesis):
    page = asr.mark_words(reference, hypothesis)
    written = re.sub(r'<span style="color:#888">\[.*?\]</span>', "", page)
    assert "<" not in re.sub(r"</?[bi]( style=[^<>]*)?>", "", written)  # what was said and written is no HTML
    text = html.unescape(re.sub(r"</?b[^>]*>", "", written))
    assert text.split() == (hypothesis.split() if reference.split() or hypothesis.split() else ["<i>nothing</i>"])
    wrong = re.findall(r"\[(.*?)\]</span>|<b [^>]*>", page)
    assert bool(wrong) == (reference.split() != hypothesis.split())


def test_marked_words_by_hand():
    page = asr.mark_words("the cat sat down", "the bat sat")
    assert page == 'the <b style="color:#c04a00">bat</b> sat <span style="color:#888">[down]</span>'
    assert asr.mark_words("", "") == "<i>nothing</i>"


@settings(deadline=None)
@given(st.lists(st.tuples(*[st.text("abz# .?", max_size=9)] * 2), max_size=4))
def test_character_errors_are_the_edits(pairs):
    said, written = [r for r, _ in pairs], [h for _, h in pairs]
    counts = asr.character_errors(said, written)
    assert counts.total() == sum(textdistance.Levenshtein(external=False)(r, h) for r, h in pairs)
    assert all(a != b and len(a) <= 1 and len(b) <= 1 for a, b in counts)
    for character in "abz# .?":
        missed = sum(n for (a, b), n in counts.items() if a == character)
        added = sum(n for (a, b), n in counts.items() if b == character)
        assert "".join(written).count(character) == "".join(said).count(character) - missed + added


def test_character_errors_by_hand():
    assert asr.character_errors(["a cat", "cup"], ["a bats", "cp"]) == {("c", "b"): 1, ("", "s"): 1, ("u", ""): 1}


def test_differences_and_wrong_stretches_by_hand():
    assert asr.wrong_stretches("one cup of tea", "one jigsaw of te") == [("cup", "jigsaw"), ("a", "")]
    assert asr.differences("one cup of tea", "one jigsaw of te") == [("", "jig"), ("cup", "saw"), ("a", "")]
    for differ in (asr.wrong_stretches, asr.differences):
        assert differ("fox", "the fox") == [("", "the ")] and differ("fox", "fox") == []
    assert asr.differences(["a", "cat", "sat"], ["a", "hat", "sat"]) == [(["cat"], ["hat"])]


@pytest.mark.parametrize("differ", [asr.differences, asr.wrong_stretches])
@given(*[st.text("abc ", max_size=12)] * 2)
def test_what_differs_leads_from_one_text_to_the_other(differ, said, written):
    stretches = differ(said, written)
    edits = sum(max(len(source), len(target)) for source, target in stretches)
    assert edits == textdistance.Levenshtein(external=False)(said, written)
    place = 0
    for source, target in stretches:
        place = said.index(source, place) + len(source)
        assert source != target and target in written


def test_the_fate_of_new_words_by_hand():
    known = {"the", "fox", "sat", "car", "ran"}
    said = ["the wolf sat, the pen-knife ran.", "a cart ran", "the wolf", "the panda sat"]
    written = ["the wolf sat, the pan ran.", "a car ran", "the", "the pan da sat"]
    assert asr.fate_of_new_words(said, written, known) == {"right": 2, "known": 1, "otherwise": 3}  # "a" is new, too
    assert asr.fate_of_new_words(said, written, known | {"a", "wolf", "pen-knife", "cart", "panda"}) == {
        "right": 0,
        "known": 0,
        "otherwise": 0,
    }


def test_tables_hold_the_scores_that_all_rows_have():
    rows = {"LSTM": {"loss": 0.5, "cer": 0.0312, "jaccard": 0.98765}, "beam": {"cer": 0.02, "jaccard": 1.0}}
    table = asr.score_table(rows)
    assert list(table.columns) == ["Jaccard", "CER"] and list(table.index) == ["LSTM", "beam"]
    assert table.to_numpy().tolist() == [["0.988", "3.1%"], ["1.000", "2.0%"]]


STRANGE = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "$\\href{javascript:alert(1)}{x}$",
    'a & b\'s "c"',
)


@pytest.mark.parametrize("text", STRANGE)
def test_names_and_texts_are_no_html_where_they_are_shown(text):
    pages = [asr.mark_words(text, "other"), asr.mark_words("other", text), asr.mark_words(text, text)]
    pages += [asr.mark_words("said", f"{text} said"), asr.mark_words(f"{text} said", "said")]
    pages += [asr.transcript_table([text], {text: [text]}), asr.score_table({text: {"cer": 0.5}})._repr_html_()]
    for page in pages:
        found = Elements(page)
        assert set(found.tags) <= {"b", "span", "table", "tr", "th", "td", "div", "style", "thead", "tbody"}, page
        assert not re.search(r"\bon\w+=|javascript:", str(found.attributes))
    for page in [pages[1], *pages[5:]]:
        assert "".join(text.split()) in "".join("".join(Elements(page).text).split())


@both_decoders
def test_the_cross_attention_shown_is_that_of_the_greedy_text(decoder):
    model = talkative(decoder, STOP_BIAS[decoder])
    clips, cache = fake_clips([44], ["x"])
    weights, text = nb.cross_attention(model, clips[0], cache)
    audio = torch.from_numpy(cache[clips[0]].astype(np.float32))[None]
    (tokens,) = model.generate(audio, torch.tensor([44]))
    assert text == model.vectorizer.decode(tokens) and weights.shape == (len(tokens) + 1, 11)
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-5)
    places = nb.heard_at(model, clips[0], cache, "cat", 0.04)
    assert places.shape == (3,) and (np.diff(places) > 0).all() and 0 < places[0] < places[-1] < 11 * 0.04
    assert nb.heard_at(model, clips[0], cache, "a cat, a cat", 0.04) is None  # eleven positions

"""`layout`, `data` (relative actions, preprocessing) and `optim` (schedules) cases: no model takes part."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_pipelines.episode import Episode, Episodes
from data_pipelines.statistics import compute
from rynnvla_jax import actions, images, sequence
from rynnvla_jax.actions import Statistics
from rynnvla_jax.columns import Columns
from rynnvla_jax.config import PERCENTILES, ImageConfig, OptimizerConfig, SequenceConfig
from rynnvla_jax.stage import start_counts
from rynnvla_jax.train.optimizer import schedule
from rynnvla_jax.vocabulary import BEGIN_IMAGE, BOS, END_IMAGE, NEW_LINE, Vocabulary, image_name
from tests.golden import folder
from tests.golden.folder import Case, CaseReport, GoldenError, Recorded

# Chameleon's own ids, which infer_step's prompts use; a layout case states them itself.
CHAMELEON = {BOS: 0, END_IMAGE: 8196, BEGIN_IMAGE: 8197, NEW_LINE: 8803}
GRID_BASE = 8804  # id of <reserved08800>
MAX_GRIDS = 64
OPTIONS = (
    "language_first",
    "language_instruction_per_frame",
    "repeat_lang_tokens",
    "condition_frame_num",
    "use_wrist_frame",
)
CODE_RULE = "code[r][c] = (value*37 + 5*r + 3*c) mod n_codes, r<H/16, c<W/16; token = code_to_token[code]"


def chameleon_vocabulary(
    code_to_token: np.ndarray, base_size: int, special: Mapping[str, int] = CHAMELEON, grid_base: int = GRID_BASE
) -> Vocabulary:
    """Special ids by name and a table of codes -> Vocabulary, the way a tokenizer.json would give it."""
    names = dict(special) | {image_name(code): int(token) for code, token in enumerate(code_to_token)}
    edges = range(1, min(MAX_GRIDS, base_size - 1 - grid_base) + 1)
    grids = {f"<reserved{8800 + n:05d}>": grid_base + n for n in edges}
    return Vocabulary.from_vocab(grids | names, base_size)


def run_layout(case: Case) -> CaseReport:
    """Token ids and labels of every option combination, and the inference prompts."""
    report, data = CaseReport(case.name, case.kind), case.read_json()
    if data["code_rule"] != CODE_RULE:
        raise GoldenError(f"case {case.name}: code_rule {data['code_rule']!r} is not known; expected {CODE_RULE!r}")
    special = data["special"]
    found = re.search(r"= (\d+)\+n_grids", special["grid_token_rule"])
    if found is None:
        raise GoldenError(f"case {case.name}: grid_token_rule {special['grid_token_rule']!r} names no base id")
    ids = {
        BOS: special["bos"],
        BEGIN_IMAGE: special["boi"],
        END_IMAGE: special["eoi"],
        NEW_LINE: special["new_line"],
    }
    vocabulary = chameleon_vocabulary(data["code_to_token"], special["action"], ids, int(found[1]))
    for name in ("action", "wrist_start", "wrist_end", "state"):
        report.compare("special", getattr(vocabulary, name), special[name], folder.EXACT, member=name)
    if "image_vocab" in data:
        by_name = Vocabulary.from_vocab(ids | data["image_vocab"], special["action"]).code_to_token
        report.compare("code_to_token", by_name, data["code_to_token"], folder.EXACT)
    rows, columns = (edge // sequence.PATCH for edge in data["image_hw"])

    def codes(values) -> np.ndarray:
        values = np.asarray(values)[..., None, None]
        return (values * 37 + 5 * np.arange(rows)[:, None] + 3 * np.arange(columns)) % data["n_codes"]

    for options in data["cases"]:
        chosen = {k: options[k] for k in OPTIONS}
        config = SequenceConfig(num_frames=data["num_frames"], **chosen)
        for i, text in enumerate(data["video_text"]):
            views = {view: codes(data[f"{view}_frame_values"][i]) for view in config.views}
            composed = sequence.compose(np.asarray(data["texts"][text]), views, vocabulary, config)
            member = f"video {i}, {chosen}"
            report.compare("input_ids", composed.tokens, options["input_ids"][i], folder.EXACT, member=member)
            report.compare("labels", composed.labels, options["labels"][i], folder.EXACT, member=member)
            for name, positions in (("state", composed.state_positions), ("action", composed.action_positions)):
                at = np.flatnonzero(np.asarray(options["input_ids"][i]) == special[name])
                report.compare(f"{name}_positions", positions, at, folder.EXACT, member=member)
    for number, wanted in enumerate(data.get("inferencer_prompts", ())):
        has_wrist = wanted.get("wrist_value") is not None
        config = SequenceConfig(repeat_lang_tokens=wanted["repeat_lang_tokens"], use_wrist_frame=has_wrist)
        views = {view: codes(wanted[f"{view}_value"]) for view in config.views}
        text = np.asarray(data["texts"][wanted["text"]])
        tokens = sequence.prompt(text, views, vocabulary, config)
        report.compare("inferencer_prompts", tokens, wanted["prompt"], folder.EXACT, member=f"prompt {number}")
    return report


def run_data(case: Case) -> CaseReport:
    """A `data` case is told by what it records."""
    io = case.recorded()
    if "vae.actions" in io:
        report = _relative_actions(case, io)
    elif "img0" in io:
        report = _preprocess(case, io)
    else:
        raise GoldenError(f"case {case.name}: neither relative actions nor preprocessing; it records {', '.join(io)}")
    report.not_compared = io.unread()
    return report


def _relative_actions(case: Case, io: Recorded) -> CaseReport:
    report = CaseReport(case.name, case.kind)
    lengths, width, chunk = case.need("episode_lengths"), case.need("action_dim"), case.need("chunk_size")
    frames = case.need("num_frames")
    found = re.search(r"action\[i,:(\d+)\]", case.need("rules")["chunk"])
    columns = Columns.unstated("", width, width, range(int(found[1]) if found else width - 1, width))
    episodes = [(io[f"ep{e}.action"], io[f"ep{e}.state"]) for e in range(len(lengths))]

    for e, (action, state) in enumerate(episodes):
        report.compare("episode_lengths", len(action), lengths[e], folder.EXACT, member=f"episode {e}")
        for start in range(len(action)):
            rows = actions.relative_chunk(action, state, start, chunk, columns)
            padded, is_pad = actions.pad_chunk(rows, chunk)
            member = f"episode {e}, start {start}"
            if f"ep{e}.raw_chunks" in io:
                report.compare("raw_chunks", padded, io[f"ep{e}.raw_chunks"][start], folder.ACTIONS, member=member)
                length = io[f"ep{e}.raw_chunk_len"][start]
                report.compare("raw_chunk_len", (~is_pad).sum(), length, folder.EXACT, member=member)

    recorded = [
        Episode(f"ep{e}", ("",), np.zeros(len(action), np.int32), 30.0, state, action, columns)
        for e, (action, state) in enumerate(episodes)
    ]
    low, high = case.entry.get("percentile_range", PERCENTILES)
    ours = compute([Episodes.of(recorded, "golden")], chunk, progress=False, percentiles=(low, high))
    golden = {}
    for name in ("rel_min_action", "rel_max_action", "rel_mean_action", "rel_std_action", "mean_state", "std_state"):
        golden[name] = io[f"{name}_f64"]
        # In units of the spread, as the model sees them: the raw ones are tens of degrees, accumulated in float32.
        spread = io["std_state_f64" if name.endswith("_state") else "rel_std_action_f64"]
        spread = np.where(spread > 0, spread, 1.0)
        report.compare(name, getattr(ours, name) / spread, golden[name] / spread, folder.ACTIONS)
    statistics = Statistics(**golden, columns=columns)

    for part, count in (("vae", 0), ("vla", frames)):
        each = start_counts(lengths, count, chunk + 1).tolist()
        starts = [(e, s) for e, n in enumerate(each) for s in range(n)]
        report.compare(f"{part}.start", [s for _, s in starts], io[f"{part}.start"], folder.EXACT)
        report.compare(f"{part}.episode", [e for e, _ in starts], io[f"{part}.episode"], folder.EXACT)
        if counts := case.entry.get("counts"):
            report.compare(f"{part}.count", len(starts), counts[part], folder.EXACT)
            report.compare(f"{part}.count_per_episode", each, counts[f"per_episode_{part}"], folder.EXACT)

    def normalised(e: int, start: int, mode: str) -> np.ndarray:
        rows = actions.relative_chunk(*episodes[e], start, chunk, columns)
        return actions.normalize_actions(actions.pad_chunk(rows, chunk)[0], statistics, mode)

    vae = list(zip(io["vae.episode"], io["vae.start"], strict=True))
    report.compare("vae.actions", [normalised(e, s, "mean_std") for e, s in vae], io["vae.actions"], folder.ACTIONS)
    pads = [np.arange(chunk) >= lengths[e] - s for e, s in vae]
    report.compare("vae.is_pad", np.stack(pads), io["vae.is_pad"], folder.EXACT)
    vla = list(zip(io["vla.episode"], io["vla.start"], strict=True))
    for mode in ("mean_std", "min_max"):
        if f"vla.{mode}.actions" in io:
            chunks = [[normalised(e, s + t, mode) for t in range(frames)] for e, s in vla]
            report.compare(f"vla.{mode}.actions", chunks, io[f"vla.{mode}.actions"], folder.ACTIONS)
            states = [actions.normalize_state(episodes[e][1][s : s + frames], statistics) for e, s in vla]
            report.compare(f"vla.{mode}.state", states, io[f"vla.{mode}.state"], folder.ACTIONS)
        if f"decode.{mode}.normalised_in" in io:
            for i, (e, s) in enumerate(io["decode.index"]):
                inputs, member = io[f"decode.{mode}.normalised_in"][i], f"episode {e}, start {s}"
                report.compare(
                    f"decode.{mode}.normalised_in", normalised(e, s, mode), inputs, folder.ACTIONS, member=member
                )
                out = actions.decode_chunk(inputs, episodes[e][1][s], statistics, mode)
                golden_out = io[f"decode.{mode}.absolute_out"][i]
                report.compare(f"decode.{mode}.absolute_out", out, golden_out, folder.ACTIONS, member=member)
    return report


def _preprocess(case: Case, io: Recorded) -> CaseReport:
    report = CaseReport(case.name, case.kind)
    sizes = case.entry.get("in_train_infer_sizes", ())
    for i in range(sum(key.startswith("img") for key in io)):
        for column, mode in enumerate(("train", "infer"), start=1):
            config = ImageConfig(shortest_edge=case.need("target"), fit=f"reference_{mode}")
            frame = io[f"img{i}"]
            if i < len(sizes):
                size = images.frame_size(*frame.shape[:2], config)
                report.compare("sizes", size, sizes[i][column], folder.EXACT, member=f"img{i}, {mode}")
            ours = images.preprocess(frame, config)
            golden = io[f"{mode}{i}"].transpose(1, 2, 0)
            report.compare(f"{mode}{i}", images.normalize(ours), golden, folder.ACTIONS)
            report.compare(f"{mode}{i}_u8", ours.astype(np.float32), np.rint((golden * 0.5 + 0.5) * 255), folder.EXACT)
    return report


def run_schedules(case: Case) -> CaseReport:
    """Learning rate of every recorded step."""
    report = CaseReport(case.name, case.kind)
    for name, recorded in case.read_json().items():
        if "args" in recorded:
            args = recorded["args"]
            config = OptimizerConfig(
                schedule="action_vae",
                peak_lr=recorded["base_lr"],
                min_lr=args["lr_min"],
                warmup_steps=float(args["warmup_steps"]),
                warmup_lr=args["warmup_lr_init"],
            )
            total = args["n_epoch"] * args["n_iter_per_epoch"]
        else:
            config = OptimizerConfig(
                schedule="vla",
                peak_lr=recorded["lr"],
                min_lr=recorded["min_lr"],
                warmup_steps=recorded["warmup_epochs"] * recorded["iters_per_epoch"],
            )
            total = recorded["epochs"] * recorded["iters_per_epoch"]
        golden = np.asarray(recorded["lr_used_at_step"], np.float64)
        ours: Any = schedule(config, total)(np.arange(len(golden)))
        report.compare(name, ours, golden, folder.RATES, relative=True)
    return report

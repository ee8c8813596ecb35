"""Experiment files: what they mean, and what is said of a mistake."""

import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from policies.interface import Limits
from policies.least_loaded import LeastLoaded
from viisim.config import (
    EngineConfig,
    Experiment,
    LimitsConfig,
    build_workload,
    experiment_from,
    load_experiment,
    resolved,
    scaled,
    schema,
    shared_folder,
    workload_files,
)
from viisim.errors import InputError
from viisim.profile import EngineSettings, load_profile

EXPERIMENT = """\
name: small
policy: {name: least_loaded}
cluster:
  replicas:
    - {count: 2, device: radeon_vii, model: qwen3-vl-8b-awq, engine: {max_num_seqs: 32}}
workload: {kind: synthetic, preset: azure_conv, rate_per_s: 0.8, requests: 20}
slo: {ttft_s: 5.0, tpot_s: 0.1}
seeds: [1, 2]
"""

POLICY = """\
from policies.interface import Hold, Policy

class Mine(Policy):
    def __init__(self, cap=8, room=None):
        self.cap = cap

    def place(self, request, view):
        return Hold()
"""

TRACE = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.yaml"
    path.write_text(EXPERIMENT)
    return path


def mistake(file: Path, *overrides: str) -> str:
    """What is said of the file with these overrides, less the file's name in front."""
    with pytest.raises(InputError) as caught:
        load_experiment(file, overrides)
    return str(caught.value).removeprefix(f"{file}: ")


# -- what a file means -----------------------------------------------------------------------


def test_reads_what_the_file_says(file: Path) -> None:
    experiment = load_experiment(file)
    assert (experiment.name, experiment.seeds, experiment.slo.ttft_s) == ("small", (1, 2), 5.0)


def test_fills_in_defaults(file: Path) -> None:
    experiment = load_experiment(file)
    assert (experiment.cluster.scrape_s, experiment.cluster.scrape_delay_s) == (1.0, 0.05)
    assert experiment.warmup_fraction == 0.1
    assert experiment.limits.limits() == Limits()


def test_an_override_reaches_into_lists(file: Path) -> None:
    experiment = load_experiment(file, ["cluster.replicas.0.count=8"])
    assert len(experiment.simulated_replicas()) == 8


def test_an_override_may_add_a_key(file: Path) -> None:
    experiment = load_experiment(file, ["limits.max_queued=7", "slo.e2e_s=1e-3"])
    assert (experiment.limits.max_queued, experiment.slo.e2e_s) == (7, 0.001)


def test_replica_ids_sort_in_the_order_of_the_file(file: Path) -> None:
    replicas = load_experiment(file, ["cluster.replicas.0.count=11"]).simulated_replicas()
    ids = [replica.id for replica in replicas]
    assert ids == sorted(ids)
    assert (ids[0], ids[-1]) == ("r00", "r10")


def test_a_replica_has_its_profiles_settings_unless_the_file_differs(file: Path) -> None:
    settings = load_experiment(file).simulated_replicas()[0].settings
    profile = load_profile("radeon_vii/qwen3-vl-8b-awq")
    assert settings.max_num_seqs == 32
    assert settings.num_kv_blocks == profile.engine.num_kv_blocks


def test_a_policy_gets_its_parameters(file: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(POLICY)
    experiment = load_experiment(file, ['policy={class: "mine.py:Mine", cap: 3}'])
    assert vars(experiment.policy.make())["cap"] == 3


def test_every_call_makes_a_new_policy(file: Path) -> None:
    config = load_experiment(file).policy
    assert isinstance(config.make(), LeastLoaded)
    assert config.make() is not config.make()


def test_the_requests_ask_for_the_only_model(file: Path) -> None:
    experiment = load_experiment(file)
    first = next(experiment.build_workload().requests(seed=1))
    assert first.view.model == "qwen3-vl-8b-awq"


def test_given_lengths_go_before_a_presets(file: Path) -> None:
    experiment = load_experiment(file, ["workload.prompt_tokens=512"])
    requests = experiment.build_workload().requests(seed=1)
    assert {request.view.prompt_tokens for request in requests} == {512}


def test_a_trace_path_starts_in_the_files_folder(file: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(TRACE)
    experiment = load_experiment(file, ["workload={kind: trace, path: t.csv}"])
    assert build_workload(experiment.workload, "m").total_requests == 2


def test_a_trace_that_is_not_there_is_looked_up_where_one_stands(
    file: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path_factory.mktemp("here")
    (here / "t.csv").write_text(TRACE)
    monkeypatch.chdir(here)
    experiment = load_experiment(file, ["workload={kind: trace, path: t.csv}"])
    assert build_workload(experiment.workload, "m").total_requests == 2


def test_a_shared_trace_is_looked_up_in_the_shared_folder(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIISIM_SHARED", str(tmp_path))
    (tmp_path / "t.csv").write_text(TRACE)
    experiment = load_experiment(file, ["workload={kind: trace, path: $VIISIM_SHARED/t.csv}"])
    assert experiment.build_workload().total_requests == 2


def test_the_shared_folder_is_beside_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VIISIM_SHARED", raising=False)
    assert shared_folder() == Path(__file__).parents[2] / "shared"


def test_an_entry_for_a_running_server_needs_no_device(file: Path) -> None:
    entry = 'cluster.replicas=[{model: m, worker: {kind: url, url: "http://127.0.0.1:1"}}]'
    assert load_experiment(file, [entry]).cluster.models == ["m"]


def test_a_running_server_cannot_be_simulated(file: Path) -> None:
    entry = 'cluster.replicas=[{model: m, worker: {kind: url, url: "http://127.0.0.1:1"}}]'
    experiment = load_experiment(file, [entry])
    with pytest.raises(InputError, match=r"cluster\.replicas\.0\.worker\.kind: 'url' is for dep"):
        experiment.simulated_replicas()


def test_an_experiment_can_be_sent_to_another_process(file: Path) -> None:
    experiment = load_experiment(file)
    assert pickle.loads(pickle.dumps(experiment)) == experiment


def test_reading_experiments_pulls_in_no_simulation_kernel() -> None:
    code = "import sys, viisim.config; sys.exit('simpy' in sys.modules)"
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


# -- workloads -------------------------------------------------------------------------------

SESSIONS = """workload={kind: sessions, requests: 30, rate_per_s: 1.0, turns: 3, first_tokens: 90,
    turn_tokens: 20, output_tokens: 9, think_s: {median: 5, cv: 1}}"""
MIXED = """workload={kind: mixed, parts: [
    {kind: synthetic, preset: azure_conv, rate_per_s: 2.0, requests: 20, traffic_class: chat},
    {kind: synthetic, preset: azure_code, requests: 30, traffic_class: batch, priority: 5}]}"""


def pool(folder: Path) -> Path:
    """A ServeGen pool of one client with a request a second."""
    quantiles = {"q": list(range(1, 102))}
    lengths = {"0": {"input_tokens": quantiles, "output_tokens": quantiles}}
    client = {"client": 0, "windows": [[0, 1.0, 1.0, "G"]], "lengths": lengths}
    content = {"source": "made", "window_s": 600, "length_window_s": 21600, "clients": [client]}
    path = folder / "pool.json"
    path.write_text(json.dumps(content))
    return path


def arrivals_s(experiment: Experiment) -> list[float]:
    return [request.view.arrived_s for request in experiment.build_workload().requests(1)]


def test_arrivals_may_be_bursty(file: Path) -> None:
    poisson = arrivals_s(load_experiment(file))
    for arrivals in (
        "{kind: gamma, cv: 2}",
        "{kind: gamma, burstiness: 2.0}",
        "{kind: weibull, cv: 2}",
    ):
        bursty = load_experiment(file, [f"workload.arrivals={arrivals}"])
        assert arrivals_s(bursty) != poisson


def test_arrivals_may_follow_the_time_of_day(file: Path) -> None:
    curve = "workload.rate_curve={period_s: 100, points: {0: 0, 50: 1}, shape: steps}"
    assert all(second % 100 >= 49.9 for second in arrivals_s(load_experiment(file, [curve])))


def test_the_labels_of_a_workload_are_on_its_requests(file: Path) -> None:
    labels = ["traffic_class=chat", "tenant=acme", "priority=2", "deadline_s=7"]
    experiment = load_experiment(file, [f"workload.{label}" for label in labels])
    view = next(experiment.build_workload().requests(1)).view
    assert (view.traffic_class, view.tenant, view.priority) == ("chat", "acme", 2)
    assert view.deadline_s == view.arrived_s + 7


def test_the_labels_of_a_trace_are_on_its_requests(file: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(TRACE)
    trace = "workload={kind: trace, path: t.csv, tenant: acme, deadline_s: 3}"
    views = [r.view for r in load_experiment(file, [trace]).build_workload().requests(1)]
    assert {view.tenant for view in views} == {"acme"}
    assert all(view.deadline_s == view.arrived_s + 3 for view in views)


def test_sessions_are_built_from_their_figures(file: Path) -> None:
    workload = load_experiment(file, [SESSIONS]).build_workload()
    assert workload.total_requests == 30
    assert len(list(workload.requests(1))) == 10


def test_sessions_are_built_from_a_preset_less_what_is_given(file: Path) -> None:
    given = "workload={kind: sessions, preset: agentic_coding, requests: 30, turns: 3}"
    assert len(list(load_experiment(file, [given]).build_workload().requests(1))) == 10


def test_a_mixture_keeps_the_labels_of_its_parts(file: Path) -> None:
    requests = load_experiment(file, [MIXED]).build_workload().requests(1)
    classes = [request.view.traffic_class for request in requests]
    assert (classes.count("chat"), classes.count("batch")) == (20, 30)


def test_the_parts_of_a_mixture_may_ask_for_different_models(file: Path) -> None:
    second = "{model: other, worker: {kind: url, url: 'http://h:1'}}"
    cluster = f"cluster.replicas=[{{device: radeon_vii, model: qwen3-vl-8b-awq}}, {second}]"
    models = ["workload.model=qwen3-vl-8b-awq", "workload.parts.1.model=other"]
    requests = load_experiment(file, [cluster, MIXED, *models]).build_workload().requests(1)
    asked = {(request.view.traffic_class, request.view.model) for request in requests}
    assert asked == {("chat", "qwen3-vl-8b-awq"), ("batch", "other")}


def test_a_pool_is_served_at_the_stated_rate(file: Path, tmp_path: Path) -> None:
    pool(tmp_path)
    given = "workload={kind: servegen, path: pool.json, duration_s: 600, rate_per_s: 0.5}"
    assert load_experiment(file, [given]).build_workload().total_requests == 300


def test_the_files_of_a_workload_are_named_by_their_keys(file: Path, tmp_path: Path) -> None:
    parts = "[{kind: trace, path: t.csv}, {kind: servegen, path: pool.json}]"
    workload = load_experiment(file, [f"workload={{kind: mixed, parts: {parts}}}"]).workload
    assert workload_files(workload) == {
        "parts.0.path": tmp_path / "t.csv",
        "parts.1.path": tmp_path / "pool.json",
    }
    assert workload_files(load_experiment(file).workload) == {}


# -- the same workload at another rate -------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    ["name=x", "workload.rate_per_s=null", SESSIONS, MIXED, "workload={kind: trace, path: t.csv}"],
    ids=["given", "preset", "sessions", "mixed", "trace"],
)
def test_a_scaled_workload_has_the_same_requests_closer_together(
    file: Path, tmp_path: Path, override: str
) -> None:
    (tmp_path / "t.csv").write_text(TRACE)
    config = load_experiment(file, [override]).workload
    before, after = (
        list(build_workload(workload, "m").requests(1)) for workload in (config, scaled(config, 4))
    )
    contents = [sorted((r.view.id, r.view.prompt_tokens) for r in rows) for rows in (before, after)]
    times = [[r.arrived_ns for r in rows] for rows in (before, after)]
    assert contents[0] == contents[1]
    assert times[1] == pytest.approx([when / 4 for when in times[0]], abs=len(before))


def test_a_scaled_pool_has_more_requests_in_the_same_time(file: Path, tmp_path: Path) -> None:
    pool(tmp_path)
    for rate, expected in (("rate_per_s: 0.5", 1200), ("rate_scale: 2.0", 4800)):
        given = f"workload={{kind: servegen, path: pool.json, duration_s: 600, {rate}}}"
        workload = scaled(load_experiment(file, [given]).workload, 4)
        assert build_workload(workload, "m").total_requests == expected


@pytest.mark.parametrize("factor", [0, -1.0, float("nan")])
def test_an_impossible_load_is_refused(file: Path, factor: float) -> None:
    with pytest.raises(InputError, match=r"load: .* use a factor above 0"):
        scaled(load_experiment(file).workload, factor)


# -- models that mirror others ---------------------------------------------------------------


def test_every_engine_setting_can_be_overridden() -> None:
    assert list(EngineConfig.model_fields) == list(EngineSettings.model_fields)


def test_every_limit_of_the_core_can_be_set() -> None:
    assert list(LimitsConfig.model_fields) == [field.name for field in dataclasses.fields(Limits)]


# -- the resolved form -----------------------------------------------------------------------


def through_json(experiment: Experiment) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(json.dumps(resolved(experiment)))
    return content


@pytest.mark.parametrize(
    "override",
    [
        "policy={name: round_robin}",
        "workload.prompt_tokens={0: 1, 2.5: 7, 100: 9}",
        "workload={kind: trace, path: t.csv, limit: 3, skip_bad: true, closed_loop: false}",
        "workload.arrivals={kind: gamma, cv: 2.0}",
        "workload.rate_curve={period_s: 86400, points: {0: 0.3, 43200: 1.6}}",
        "workload={kind: synthetic, preset: rag, requests: 9, tenant: a, deadline_s: 3.5}",
        "workload.passages={pool: 9, per_request: 2, zipf: 0.5, tokens: 90}",
        "workload={kind: sessions, preset: agentic_coding, requests: 9, max_prompt_tokens: 16000}",
        "workload.parts.0={kind: synthetic, preset: azure_code, requests: 3, traffic_class: code}",
        "workload={kind: servegen, path: p.json, start_s: 600.0, rate_per_s: 2.0}",
        "limits={max_queued: 3, eject_s: 0.5}",
        "cluster.replicas.0.engine={watermark: 0.01, coalesce: false}",
    ],
)
def test_the_resolved_form_survives_json_and_loading(file: Path, override: str) -> None:
    mixed = ["workload={kind: mixed, parts: [null]}"] if ".parts." in override else []
    content = through_json(load_experiment(file, [*mixed, override]))
    assert resolved(experiment_from(content, "manifest")) == content


def test_the_resolved_form_states_every_engine_setting(file: Path) -> None:
    entry = resolved(load_experiment(file))["cluster"]["replicas"][0]
    assert list(entry["engine"]) == list(EngineSettings.model_fields)
    assert entry["profile"] == "radeon_vii/qwen3-vl-8b-awq"


def test_the_resolved_form_keeps_a_parameter_that_is_null(file: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(POLICY)
    experiment = load_experiment(file, ['policy={class: "mine.py:Mine", room: null}'])
    assert resolved(experiment)["policy"] == {"class": "mine.py:Mine", "room": None}


def test_the_resolved_form_holds_no_path_of_this_machine(file: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(POLICY)
    profile = tmp_path / "p.yaml"
    shipped = load_profile("bench/a100_like").model_dump_json()
    profile.write_text(shipped)  # JSON is YAML
    experiment = load_experiment(
        file,
        [
            f'policy={{class: "{tmp_path}/mine.py:Mine"}}',
            f'workload={{kind: trace, path: "{tmp_path}/t.csv"}}',
            f'cluster.replicas=[{{model: a100_like, profile: "{profile}"}}]',
        ],
    )
    assert str(tmp_path) not in json.dumps(resolved(experiment))
    assert resolved(experiment)["workload"]["path"] == "t.csv"


def test_the_resolved_parts_of_a_mixture_hold_no_path_of_this_machine(
    file: Path, tmp_path: Path
) -> None:
    parts = f'[{{kind: trace, path: "{tmp_path}/t.csv"}}]'
    experiment = load_experiment(file, [f"workload={{kind: mixed, parts: {parts}}}"])
    assert str(tmp_path) not in json.dumps(resolved(experiment))
    assert resolved(experiment)["workload"]["parts"][0]["path"] == "t.csv"


def test_a_shared_path_stays_as_written(file: Path) -> None:
    path = "$VIISIM_SHARED/data/t.csv"
    experiment = load_experiment(file, [f"workload={{kind: trace, path: {path}}}"])
    assert resolved(experiment)["workload"]["path"] == path


def test_loading_leaves_the_data_it_was_given_alone() -> None:
    data = {"name": "x"}
    with pytest.raises(InputError):
        experiment_from(data, "manifest", overrides=["name=y"])
    assert data == {"name": "x"}


# -- mistakes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "policy.name=least_load",
            "policy.name: unknown policy 'least_load'. Did you mean 'least_loaded'?",
        ),
        ("policy={}", "policy: give either name or class"),
        ("polcy=1", "unknown key 'polcy'. Did you mean 'policy'?"),
        (
            "cluster.replicas.0.cuont=2",
            "cluster.replicas.0: unknown key 'cuont'. Did you mean 'count'?",
        ),
        ("cluster=7", "cluster: must have keys below it, not 7"),
        ("cluster.replicas=[]", "cluster.replicas: must have at least one entry"),
        (
            "cluster.replicas.0.count=true",
            "cluster.replicas.0.count: must be a valid integer, not True",
        ),
        (
            "cluster.replicas.0.model=qwen3",
            "cluster.replicas.0: no profile 'radeon_vii/qwen3' ships, and without one: "
            "unknown model 'qwen3'. Did you mean 'qwen3-8b'?",
        ),
        (
            "cluster.replicas.0.device=null",
            "cluster.replicas.0.device: required, but missing "
            "(only a worker of kind url needs none)",
        ),
        (
            "cluster.replicas.0.tensor_parallel=2",
            "cluster.replicas.0.tensor_parallel: profile 'radeon_vii/qwen3-vl-8b-awq' is for 1, "
            "not 2; name another profile",
        ),
        (
            "cluster.replicas.0.engine.num_kv_blocks=100",
            "cluster.replicas.0.engine.max_model_len: 16384 tokens do not fit the KV cache, which "
            "holds 1584 (num_kv_blocks - 1 blocks of 16); lower it",
        ),
        (
            "cluster.replicas.0.worker.kind=url",
            "cluster.replicas.0.worker.url: required for kind 'url', but missing",
        ),
        ("workload.rate_per_s=-1", "workload.rate_per_s: must be greater than 0, not -1"),
        ("workload.kind=trce", "workload.kind: unknown kind 'trce'. Did you mean 'trace'?"),
        ("workload={}", "workload.kind: required, but missing"),
        ("workload={kind: trace}", "workload.path: required, but missing"),
        (
            "workload.preset=azure_con",
            "workload.preset: there is no 'azure_con'; did you mean 'azure_conv'?",
        ),
        (
            "workload.preset=null",
            "workload.prompt_tokens: required without a preset, but missing",
        ),
        (
            "workload.output_tokens={0: 2}",
            "workload.output_tokens: a quantile table goes from 0 to 100; add the ends",
        ),
        (
            "workload.model=foo",
            "workload.model: nothing serves 'foo'. There are: qwen3-vl-8b-awq.",
        ),
        (
            "workload.arrivals={kind: gamma}",
            "workload.arrivals.cv: kind 'gamma' needs cv or burstiness, one of it",
        ),
        (
            "workload.arrivals={cv: 2}",
            "workload.arrivals.cv: a Poisson process has none to choose; write kind: gamma or "
            "weibull",
        ),
        (
            "workload.arrivals={kind: weibull, cv: 2, burstiness: 1}",
            "workload.arrivals.burstiness: kind 'weibull' has none; write kind: gamma, or give cv",
        ),
        (
            "workload.arrivals={kind: gamma, cv: 1000}",
            "workload.arrivals.cv: 1000.0 is not possible; use a number from 0.01 to 100",
        ),
        (
            "workload.rate_curve={points: {9: 1}}",
            "workload.rate_curve.points: times go from 0 to below period_s; correct them",
        ),
        (
            "workload.rate_curve={points: 3}",
            "workload.rate_curve.points: must be a table {second: factor}, not 3",
        ),
        ("workload.deadline_s=0", "workload.deadline_s: must be greater than 0, not 0"),
        (
            "workload={kind: sessions, requests: 9, preset: azure_conv}",
            "workload.preset: 'azure_conv' tells nothing of sessions; use one of agentic_coding, "
            "mooncake_conversation",
        ),
        (
            "workload={kind: sessions, requests: 9, rate_per_s: 1}",
            "workload.turns: required without a preset, but missing",
        ),
        (
            "workload={kind: servegen, path: p, rate_scale: 2, rate_per_s: 2}",
            "workload.rate_scale: stated by rate_per_s already; delete one of them",
        ),
        ("workload={kind: mixed, parts: []}", "workload.parts: must have at least one entry"),
        (
            "workload={kind: mixed, parts: [{kind: synthetic, requests: 9, preset: azure_con}]}",
            "workload.parts.0.preset: there is no 'azure_con'; did you mean 'azure_conv'?",
        ),
        (
            "workload={kind: mixed, parts: [{kind: mixed, parts: []}]}",
            "workload.parts.0.kind: unknown kind 'mixed'. There are: synthetic, sessions, trace, "
            "servegen.",
        ),
        (
            "workload={kind: mixed, parts: [{kind: trace, path: t, model: foo}]}",
            "workload.parts.0.model: nothing serves 'foo'. There are: qwen3-vl-8b-awq.",
        ),
        ("seeds=[]", "seeds: must have at least one entry"),
        ("seeds=3", "seeds: must be a list, not 3"),
        ("seeds=[4, 4]", "seeds: 4 comes twice; equal seeds give equal runs"),
        ("seeds=[1, -1]", "seeds.1: must be greater than or equal to 0, not -1"),
        ("slo.ttft_s=.nan", "slo.ttft_s: must be a finite number, not nan"),
        ("warmup_fraction=1", "warmup_fraction: must be less than 1, not 1"),
    ],
)
def test_a_mistake_is_one_line_with_key_and_repair(file: Path, override: str, said: str) -> None:
    assert mistake(file, override) == said


def test_a_mistake_names_the_file(file: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_experiment(file, ["seeds=3"])
    assert str(caught.value).startswith(f"{file}: ")


def test_several_models_need_a_word_on_which_is_asked_for(file: Path) -> None:
    second = "{model: other, worker: {kind: url, url: 'http://h:1'}}"
    first = "{device: radeon_vii, model: qwen3-vl-8b-awq}"
    said = mistake(file, f"cluster.replicas=[{first}, {second}]")
    assert said == "workload.model: required with several models: other, qwen3-vl-8b-awq"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seeds", "--set seeds: write key.path=value"),
        ("name.y=3", "--set name.y=3: 'y' is not a key there; nothing lies below 'small'"),
        (
            "cluster.replicas.1.count=3",
            "--set cluster.replicas.1.count=3: '1' is no entry; use 0 to 0",
        ),
    ],
)
def test_an_override_that_fits_nothing_is_refused(file: Path, override: str, said: str) -> None:
    assert mistake(file, override) == said


def test_a_key_that_comes_twice_is_refused(file: Path) -> None:
    file.write_text(EXPERIMENT + "name: again\n")
    assert mistake(file) == "line 9: key 'name' comes twice; correct it"


def test_broken_yaml_is_refused_with_its_line(file: Path) -> None:
    file.write_text(EXPERIMENT + "deploy: [\n")
    assert mistake(file).startswith("line 10: ")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert mistake(tmp_path / "no.yaml").startswith("No such file or directory")


@pytest.mark.parametrize("content", ["", "- 1", "text"])
def test_a_file_that_is_no_mapping_is_refused(file: Path, content: str) -> None:
    file.write_text(content)
    assert mistake(file).startswith("must have keys below it")


def test_a_broken_trace_row_names_file_and_line(file: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(TRACE + "2023-11-16 18:15:51.0,many,1\n")
    experiment = load_experiment(file, ["workload={kind: trace, path: t.csv}"])
    with pytest.raises(InputError, match=r"t\.csv:4: "):
        experiment.build_workload()


# -- the schema ------------------------------------------------------------------------------


def test_the_schema_knows_every_key_of_an_experiment() -> None:
    assert set(schema()["properties"]) == set(Experiment.model_fields)


def test_the_schema_says_class_as_the_file_does() -> None:
    assert set(schema()["$defs"]["PolicyConfig"]["properties"]) == {"name", "class"}


def test_every_part_of_an_experiment_is_frozen(file: Path) -> None:
    experiment = load_experiment(file)
    parts: list[BaseModel] = [experiment, experiment.slo, experiment.workload, experiment.policy]
    for part in parts:
        with pytest.raises(ValueError, match="frozen"):
            part.name = "other"  # type: ignore[attr-defined]

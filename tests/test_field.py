"""benchmarks/field.py as far as it starts nothing: command lines, figures, the table."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web
from aiohttp.test_utils import TestServer

from benchmarks import field
from benchmarks.field import Counted, Run, System
from policies.testing import request
from runtime.load import Record
from viisim.config import Slo, SloConfig, experiment_from
from viisim.documents import read_yaml
from viisim.errors import InputError
from viisim.workload.request import Request

URLS = ["http://127.0.0.1:1", "http://127.0.0.1:2"]
SLO = SloConfig(classes={"interactive": Slo(ttft_s=1.0), "batch": Slo(ttft_s=10.0)})
NO_WARM_UP = Counted(frozenset({"a", "b", "c"}), 2.0)
SYSTEM = System("smg", "least_load")


def record(name: str, ttft_s: float, traffic_class: str = "interactive", **more: Any) -> Record:
    """A whole answer of two tokens, but for what is said."""
    answered = {"status": 200, "output_tokens": 2, "token_s": [ttft_s, ttft_s + 0.1]}
    given = {"due_s": 0.0, "sent_s": 0.0, "ttft_s": ttft_s, "e2e_s": ttft_s + 0.1, **answered}
    return Record(name, traffic_class=traffic_class, **{**given, **more})


def judged(*records: Record, counted: Counted = NO_WARM_UP) -> Run:
    return field.judged(
        records, counted, SLO, system=SYSTEM, seed=1, router_cpu=0.01, client_cpu=0.02
    )


def run(system: str, seed: int, goodput_per_s: float, p99_s: float = 1.0) -> Run:
    return Run(system, seed, goodput_per_s, 0, 0.0, 0.01, 0.02, {"batch": p99_s}, {"batch": 1.0})


def due(name: str, at_s: float, traffic_class: str = "", prompt_tokens: int = 5) -> Request:
    view = request(id=name, prompt_tokens=prompt_tokens, traffic_class=traffic_class)
    return Request(view, round(at_s * 1e9), ((name, prompt_tokens),), output_tokens=2)


class TestSystems:
    def test_a_name_is_router_and_policy(self):
        assert System.named("smg:least_load") == System("smg", "least_load")

    def test_a_rival_alone_has_its_policy_still_to_be_chosen(self):
        assert System.named("vllm-router") == System("vllm-router", "")

    @pytest.mark.parametrize("name", ["viisim", "nginx:random"])
    def test_an_unknown_system_is_refused_with_those_there_are(self, name: str):
        with pytest.raises(InputError, match=r"there are viisim:POLICY, vllm-router\[:POLICY\]"):
            System.named(name)

    def test_one_that_is_left_out_needs_no_program(self):
        options = field.parsed(["--without", "smg", "--without", "vllm-router"])
        assert field.programs_of(options) == {}

    def test_a_missing_program_is_an_error_that_says_how_to_get_it_or_do_without(self):
        options = field.parsed(["--smg", "/nowhere/smg", "--without", "vllm-router"])
        with pytest.raises(InputError, match=r"pip install smg==.* --smg PATH, .* --without smg"):
            field.programs_of(options)

    def test_every_seed_goes_through_every_system(self):
        systems = [System("viisim", "hybrid"), System("smg", "least_load")]
        pairs = field.orders(systems, [1, 2, 3])
        assert [seed for seed, _ in pairs] == [1, 1, 2, 2, 3, 3]
        assert all({pairs[i][1], pairs[i + 1][1]} == set(systems) for i in (0, 2, 4))

    def test_systems_take_turns_in_an_order_of_each_seed(self):
        systems = [System("viisim", name) for name in "abcd"]
        pairs = field.orders(systems, range(20))
        assert len({tuple(pairs[at : at + 4]) for at in range(0, 80, 4)}) > 10


class TestCommands:
    def test_vllm_router_is_given_workers_policy_and_ports(self):
        command = field.rival_command(System("vllm-router", "power_of_two"), "vr", URLS, 5, 6)
        assert command == [
            *("vr", "--host", "127.0.0.1", "--port", "5", "--worker-urls", *URLS),
            *("--policy", "power_of_two", "--worker-startup-check-interval", "1"),
            *("--prometheus-host", "127.0.0.1", "--prometheus-port", "6"),
            *("--log-level", "warning"),
        ]

    def test_smg_is_told_the_engine_and_reads_gauges_as_often_as_viisim(self):
        command = field.rival_command(SYSTEM, "smg", URLS, 5, 6)
        assert command[:2] == ["smg", "launch"]
        assert command[command.index("--backend") + 1] == "vllm"
        assert command[command.index("--load-monitor-interval") + 1] == "1"

    def test_viisim_takes_the_running_workers_with_its_policy_and_its_clients(self):
        file = field.EXPERIMENT
        data = field.single(read_yaml(file), file.parent)
        found = field.deployed(data, "twin", URLS, 5, ["batch", "interactive"])
        experiment = experiment_from(found, "test")
        assert experiment.policy.name == "twin"
        assert [entry.worker.url for entry in experiment.cluster.replicas] == URLS
        assert [key.traffic_class for key in experiment.deploy.keys] == ["batch", "interactive"]
        assert experiment.deploy.listen == "127.0.0.1:5"
        assert experiment.deploy.tokenizer == data["deploy"]["tokenizer"]

    def test_its_policy_may_have_parameters(self):
        data = field.single(read_yaml(field.EXPERIMENT), field.EXPERIMENT.parent)
        found = field.deployed(data, "twin/shed_late=true", URLS, 5, [])
        assert found["policy"] == {"name": "twin", "shed_late": True}

    def test_its_file_can_be_anywhere(self, tmp_path: Path):
        file = field.EXPERIMENT
        path = tmp_path / "viisim.yaml"
        path.write_text(yaml.safe_dump(field.single(read_yaml(file), file.parent)))
        (profile, _) = [
            entry.load_profile()
            for entry in experiment_from(read_yaml(path), str(path), tmp_path).cluster.replicas
        ]
        assert profile.model == "s"

    def test_a_count_becomes_an_entry_for_each(self):
        data = {"cluster": {"replicas": [{"model": "m", "count": 2}, {"model": "m"}]}}
        entries = field.single(data, Path())["cluster"]["replicas"]
        assert entries == [{"model": "m", "count": 1}] * 3


class TestProfiles:
    def test_one_that_is_there_is_taken_by_all_equal_workers(self, tmp_path: Path):
        (tmp_path / "r0.yaml").write_text("a profile")
        data = {"cluster": {"replicas": [{"model": "m"}, {"model": "m"}]}}
        entries = field.measured(data, tmp_path)["cluster"]["replicas"]
        assert [entry["profile"] for entry in entries] == [str(tmp_path / "r0.yaml")] * 2


class TestFigures:
    def test_goodput_counts_those_within_the_objective_of_their_class(self):
        run = judged(record("a", 0.5), record("b", 1.5), record("c", 9.0, "batch"))
        assert run.goodput_per_s == 1.0
        assert run.met_share == {"batch": 1.0, "interactive": 0.5}

    def test_a_failed_request_counts_as_failed_and_has_no_ttft(self):
        run = judged(record("a", 0.5), record("b", 0.1, error="cut"))
        assert (run.failed, run.goodput_per_s) == (1, 0.5)
        assert run.p99_ttft_s == {"interactive": 0.5}

    def test_the_earliest_requests_are_warm_up(self):
        requests = [due(str(n), n) for n in range(10)]
        counted = Counted.of(requests, 0.2)
        assert counted == Counted(frozenset("23456789"), 7.0)
        assert judged(record("1", 0.1), record("2", 0.1), counted=counted).goodput_per_s == 1 / 7

    def test_a_run_of_one_request_is_refused(self):
        with pytest.raises(InputError, match="--run-s: too few"):
            Counted.of([due("a", 1.0)], 0.0)

    def test_the_policy_with_the_most_goodput_is_the_best(self):
        runs = [run("smg:cache_aware", 6, 1.0), run("smg:least_load", 6, 2.0)]
        assert field.best_policy(runs) == "least_load"


class TestReport:
    RUNS = (
        run("smg:least_load", 2, 2.0, 4.0),
        run("viisim:twin", 1, 1.5),
        run("viisim:twin", 2, 2.5),
        run("smg:least_load", 1, 1.0, 2.0),
    )

    def test_each_figure_has_median_mean_and_half_width_over_seeds(self):
        found = field.reported(self.RUNS)["systems"]["smg:least_load"]["p99_ttft_s"]["batch"]
        assert (found["values"], found["median"], found["mean"]) == ([2.0, 4.0], 3.0, 3.0)
        assert found["half_width"] == pytest.approx(12.706205)

    def test_goodput_is_compared_within_seeds(self):
        (found,) = field.reported(self.RUNS)["comparisons"]
        assert (found["system"], found["beside"]) == ("viisim:twin", "smg:least_load")
        assert found["gain"]["values"] == [0.5, 0.25]
        assert found["difference"]["mean"] == 0.5

    def test_a_rival_without_any_goodput_has_no_ratio(self):
        runs = [run("viisim:twin", 1, 1.0), run("smg:least_load", 1, 0.0)]
        (found,) = field.reported(runs)["comparisons"]
        assert found["gain"]["values"] == [None]

    def test_it_is_json(self):
        report = field.reported(self.RUNS)
        assert json.loads(json.dumps(report, allow_nan=False)) == report

    def test_the_table_has_ours_first_then_the_comparisons(self):
        runs = [run("smg:least_load", 1, 2.0), run("viisim:twin", 1, 2.5)]
        assert field.table(field.reported(runs)) == [
            "system          goodput/s  p99 TTFT batch, s  failed  router CPU  client CPU",
            "viisim:twin     2.5        1                  0       1.0%        2.0%",
            "smg:least_load  2          1                  0       1.0%        2.0%",
            "viisim:twin beside smg:least_load: goodput +25.0%",
        ]

    def test_the_table_shows_intervals_of_several_seeds(self):
        lines = field.table(field.reported(self.RUNS))
        assert "  2 ± 6.4  " in lines[1]


class TestTraffic:
    def test_prompts_are_texts_of_a_character_a_token_under_the_key_of_their_class(self):
        bodies: dict[str, Any] = {}

        async def answer(asked: web.Request) -> web.Response:
            bodies[asked.headers["Authorization"]] = await asked.json()
            return web.json_response({"error": "no"}, status=503)

        async def scenario() -> list[Record]:
            app = web.Application()
            app.router.add_post("/v1/completions", answer)
            async with asyncio.timeout(30), TestServer(app) as server:
                requests = [due("a", 0.0, "batch", 7), due("b", 0.0, "interactive", 9)]
                return await field.send(str(server.make_url("/")), requests, "salt", 1.0)

        records = asyncio.run(scenario())
        assert {one.id for one in records} == {"a", "b"}
        prompts = {key: body["prompt"] for key, body in bodies.items()}
        assert {key: len(prompt) for key, prompt in prompts.items()} == {
            "Bearer field-batch": 7,
            "Bearer field-interactive": 9,
        }
        assert all(prompt.isascii() and prompt.isprintable() for prompt in prompts.values())

"""Workloads composed from ServeGen pools: on small hand-made ones, and on the real days."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from viisim.errors import InputError
from viisim.workload.interface import Labels
from viisim.workload.request import Request
from viisim.workload.servegen import ServeGen
from viisim.workload.servegen_pool import read_pool

SHORT, LONG = list(range(1, 102)), list(range(1000, 1101))


def lengths(prompt: list[int], output: list[int]) -> dict[str, Any]:
    return {"input_tokens": {"mean": 0, "q": prompt}, "output_tokens": {"mean": 0, "q": output}}


def client(number: int, *windows: list[Any], known: bool = True) -> dict[str, Any]:
    both = {"0": lengths(SHORT, LONG), "21600": lengths(LONG, SHORT)}
    return {"client": number, "windows": list(windows), "lengths": both if known else None}


def window(start_s: int, rate_per_s: float, cv: float = 1.0, family: str = "G") -> list[Any]:
    return [start_s, rate_per_s, cv, family, None, None]


def pool_file(folder: Path, *clients: dict[str, Any], **changes: Any) -> Path:
    """A hand-made pool, illustrative and no data."""
    content = {
        "source": "hand-made",
        "window_s": 600,
        "length_window_s": 21600,
        "clients": list(clients),
        **changes,
    }
    path = folder / "pool.day.json.gz"
    path.write_bytes(gzip.compress(json.dumps(content).encode(), mtime=0))
    return path


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    return pool_file(
        tmp_path,
        client(0, window(0, 2.0), window(600, 1.0, 3.0), window(21600, 4.0)),
        client(3, window(0, 0.5, 2.0, "W")),
        client(7, window(0, 9.0), known=False),
    )


def served(path: Path, seed: int = 1, **changes: Any) -> list[Request]:
    return list(ServeGen(path=path, model="m", **changes).requests(seed))


def of_client(requests: list[Request], number: int) -> list[Request]:
    return [request for request in requests if request.view.tenant == f"client-{number}"]


def test_clients_are_tenants_and_send_as_their_rates_say(pool: Path):
    tenants = Counter(request.view.tenant for request in served(pool, duration_s=1200))
    assert tenants.keys() == {"client-0", "client-3"}
    assert abs(tenants["client-0"] - 1800) <= 1
    assert abs(tenants["client-3"] - 300) <= 1


def test_every_window_has_its_own_rate(pool: Path):
    arrived_s = [r.view.arrived_s for r in of_client(served(pool, duration_s=1200), 0)]
    assert abs(sum(second < 600 for second in arrived_s) - 1200) <= 1


def test_requests_come_in_order_of_arrival_and_numbered(pool: Path):
    requests = served(pool, duration_s=1200)
    arrived = [request.arrived_ns for request in requests]
    assert arrived == sorted(arrived)
    assert [request.view.id for request in requests] == [f"r{n}" for n in range(len(requests))]


def test_the_number_of_requests_is_known_before(pool: Path):
    workload = ServeGen(path=pool, model="m", duration_s=1200)
    assert {len(list(workload.requests(seed))) for seed in (1, 2)} == {workload.total_requests}


def test_equal_seeds_give_equal_requests(pool: Path):
    assert served(pool, 4) == served(pool, 4)
    assert served(pool, 4) != served(pool, 5)


def test_another_client_changes_no_other(pool: Path, tmp_path: Path):
    content = json.loads(gzip.decompress(pool.read_bytes()))
    before = of_client(served(pool), 0)
    after = of_client(served(pool_file(tmp_path, client(99, window(0, 1)), *content["clients"])), 0)
    pairs = [[(r.arrived_ns, r.view.prompt_tokens) for r in rows] for rows in (before, after)]
    assert pairs[0] == pairs[1]


def test_a_longer_time_changes_no_earlier_window(pool: Path):
    short, long = served(pool, duration_s=600), served(pool, duration_s=1200)
    assert short == long[: len(short)]


@pytest.mark.parametrize(("family", "cv"), [("G", 0.5), ("G", 2.0), ("W", 0.5), ("W", 2.0)])
def test_gaps_have_the_cv_of_the_window(tmp_path: Path, family: str, cv: float):
    path = pool_file(tmp_path, client(0, window(0, 40.0, cv, family)))
    gaps = np.diff([request.arrived_ns for request in served(path, duration_s=600)])
    # For these gaps the cv of n scatters by less than 3 cv / sqrt(n); see the arrivals' tests.
    assert abs(gaps.std() / gaps.mean() / cv - 1) <= 4 * 3 / np.sqrt(len(gaps))


def test_lengths_are_those_of_the_six_hours(pool: Path):
    early = served(pool, duration_s=600)
    late = served(pool, start_s=21600, duration_s=600)
    assert {r.view.prompt_tokens > 500 for r in early} == {False}
    assert {r.view.prompt_tokens > 500 for r in late} == {True}
    assert {r.output_tokens > 500 for r in late} == {False}


def test_lengths_have_the_quantiles_of_the_pool(tmp_path: Path):
    path = pool_file(tmp_path, client(0, window(0, 50.0)))
    tokens = np.array([r.view.prompt_tokens for r in served(path, duration_s=600)])
    for share in (0.1, 0.5, 0.9):
        below = np.mean(tokens <= 1 + 100 * share)
        # Rounding to whole tokens moves a quantile by half a percent here.
        assert abs(below - share) <= 0.005 + 4 * np.sqrt(share * (1 - share) / len(tokens))


def test_the_part_of_the_day_begins_at_zero(pool: Path):
    requests = served(pool, start_s=21_600 + 300, duration_s=300)
    assert abs(len(requests) - 1200) <= 1
    assert requests[-1].view.arrived_s <= 300


def test_a_rate_scale_multiplies_every_client(pool: Path):
    requests = served(pool, duration_s=600, rate_scale=3.0)
    assert abs(len(of_client(requests, 0)) - 3600) <= 1
    assert abs(len(of_client(requests, 3)) - 900) <= 1


def test_a_rate_is_the_mean_over_all_that_is_served(pool: Path):
    assert abs(len(served(pool, duration_s=1200, rate_per_s=5.0)) - 6000) <= 2


def test_many_slow_clients_are_represented_in_their_sum(tmp_path: Path):
    clients = [client(number, window(0, 0.1 / 600)) for number in range(200)]
    assert abs(len(served(pool_file(tmp_path, *clients), duration_s=600)) - 20) <= 2


def test_a_limit_keeps_the_earliest(pool: Path):
    assert served(pool, limit=100) == served(pool)[:100]


def test_clients_without_lengths_are_left_out_and_counted(pool: Path):
    workload = ServeGen(path=pool, model="m")
    assert workload.left_out == {7: 5400.0}
    assert workload.pool.left_out_share == pytest.approx(5400 / (5400 + 1200 + 600 + 2400 + 300))


def test_labels_are_those_given_with_the_client_as_tenant(pool: Path):
    labels = Labels(traffic_class="api", tenant="acme", priority=2, deadline_s=1.5)
    view = served(pool, labels=labels)[0].view
    assert (view.traffic_class, view.priority) == ("api", 2)
    assert view.tenant in ("acme/client-0", "acme/client-3")
    assert view.deadline_s == view.arrived_s + 1.5


def test_long_answers_are_cut_to_the_limit_and_counted(pool: Path):
    workload = ServeGen(path=pool, model="m", duration_s=600, max_output_tokens=1050)
    requests = list(workload.requests(1))
    assert max(request.output_tokens for request in requests) == 1050
    free = served(pool, duration_s=600)
    assert workload.cut_outputs == sum(r.output_tokens > 1050 for r in free) > 0


# -- the real days ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "left_out", "share"),
    [("deepseek-r1", 0, 0.0), ("mm-image", 0, 0.0), ("m-small", 5, 0.6437)],
)
def test_the_real_pools_are_read(shared: Path, name: str, left_out: int, share: float):
    path = shared / f"data/traces/servegen/{name}.day.json.gz"
    day = json.loads(gzip.decompress(path.read_bytes()))
    pool = read_pool(path)
    assert len(pool.left_out) == left_out
    assert len(pool.clients) == len(day["clients"]) - left_out
    assert pool.left_out_share == pytest.approx(share, abs=5e-5)


def test_an_hour_of_a_real_pool_has_the_rate_of_the_pool(shared: Path):
    path = shared / "data/traces/servegen/deepseek-r1.day.json.gz"
    day = json.loads(gzip.decompress(path.read_bytes()))
    rows = [row for one in day["clients"] for row in one["windows"] if row[0] < 600]
    expected = 600 * sum(row[1] for row in rows)
    workload = ServeGen(path=path, model="m", duration_s=600)
    # The golden ratio's fractions: below 2 ln(n) / ln(5) off for n clients.
    assert abs(workload.total_requests - expected) <= 2 * np.log(73) / np.log(5)


# -- mistakes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"start_s": 50_000.0}, "start_s: no client of"),
        ({"start_s": -1.0}, "start_s: no client of"),
        ({"duration_s": 0}, "duration_s: 0 is not possible"),
        ({"rate_scale": -2}, "rate_scale: -2 is not possible"),
        ({"rate_scale": 1e-9}, "rate_scale: not one request comes of it"),
        ({"rate_scale": 1e9}, "duration_s: 2.1e+12 requests are too many"),
        ({"limit": 0}, "limit: 0 is not possible"),
    ],
)
def test_an_impossible_parameter_is_named(pool: Path, change: dict[str, Any], complaint: str):
    with pytest.raises(InputError) as error:
        ServeGen(path=pool, model="m", **change)
    assert complaint in str(error.value)


@pytest.mark.parametrize(
    ("clients", "complaint"),
    [
        ([], "no client has lengths; correct the pool"),
        ([client(4, window(0, 1.0, family="Z"))], "client 4: [0, 1.0, 1.0, 'Z', None, None] is no"),
        ([client(4, window(0, -1.0))], "client 4: [0, -1.0"),
        ([client(4, window(30, 1.0))], "client 4: [30, 1.0"),
        ([client(4, window(0, 1.0, cv=0.0))], "client 4: cv: 0.0 is not possible"),
        ([client(4, window(48_000, 1.0))], "not a day of a ServeGen pool (KeyError: 43200)"),
        ([{"client": 4}], "not a day of a ServeGen pool (KeyError: 'lengths')"),
    ],
    ids=["none", "family", "rate", "grid", "cv", "no-lengths", "no-keys"],
)
def test_a_broken_pool_is_refused_with_file_and_client(
    tmp_path: Path, clients: list[Any], complaint: str
):
    path = pool_file(tmp_path, *clients)
    with pytest.raises(InputError) as error:
        read_pool(path)
    assert str(error.value).startswith(f"{path}: ")
    assert complaint in str(error.value)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"a,b,c", "not JSON; give a day of a ServeGen pool"),
        (b"[]", "not a day of a ServeGen pool"),
        (gzip.compress(b"{}" * 99, mtime=0)[:20], "the gzip data are cut or damaged"),
    ],
    ids=["text", "list", "cut"],
)
def test_a_file_that_is_no_pool_is_refused(tmp_path: Path, data: bytes, complaint: str):
    path = tmp_path / "pool"
    path.write_bytes(data)
    with pytest.raises(InputError, match=complaint):
        read_pool(path)


def test_a_missing_pool_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="give a readable pool"):
        read_pool(tmp_path / "no.json")

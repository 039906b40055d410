"""From raw ILSVRC tars to an audited run, all of it in a real S3 bucket behind a proxy that fails now and then."""

import io
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import webdataset
from rich.console import Console

from orchestrator.cli import audit, shards
from orchestrator.cli import shards as shard_jobs
from orchestrator.cli.config import AuditConfig
from orchestrator.data import manifest
from orchestrator.data.build.config import IlsvrcSource, IndexConfig, PackConfig, ShardLayout, VerifyConfig
from orchestrator.data.config import AugmentationConfig, ReadingConfig
from orchestrator.data.dataloader import BatchLoader
from orchestrator.data.dataset import SampleReader
from orchestrator.data.sampler import EpochOrder
from orchestrator.ray_backend.run_spec import Destination, Placement, RunSpec
from orchestrator.storage import file_io
from orchestrator.training.config import Cadence, TrainJob
from tests.support import imagenet, runs, tiny_shards
from tests.support.faulty import INTERNAL, SLOW_DOWN, Fault, Proxy, Request, proxied
from tests.support.s3 import S3Server, forget_clients, lead, served
from tests.support.tiny_shards import counts, kept

pytestmark = pytest.mark.process

FAULTS = (SLOW_DOWN, Fault(reset_after=700), INTERNAL, Fault(cut_after=300), Fault(lost=True))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    runs.first_optimizer_step()
    with served(tmp_path_factory.mktemp("s3")) as running:
        yield running


class Weather:
    """Lets every fifth ranged read fail, each time another way, and counts the failures."""

    def __init__(self) -> None:
        self.reads, self.faults = 0, 0

    def __call__(self, request: Request) -> Fault | None:
        if request.method != "GET" or "range" not in request.headers:
            return None
        self.reads += 1
        if self.reads % 5:
            return None
        self.faults += 1
        return FAULTS[self.faults % len(FAULTS)]


@pytest.fixture
def weather() -> Weather:
    return Weather()


@pytest.fixture
def proxy(server: S3Server, weather: Weather, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with proxied(server.endpoint, weather) as running:
        lead(monkeypatch, running.endpoint)
        yield running
    forget_clients()


@pytest.fixture
def bucket(server: S3Server, proxy: Proxy) -> str:
    return server.bucket(f"b-{uuid.uuid4().hex}")


def pack(folder: Path, url: str) -> None:
    source = IlsvrcSource(url=str(imagenet.as_it_comes(folder)))
    assert (
        shards.pack_dataset(PackConfig(source=source, url=url, layout=ShardLayout(shard_mib=0.01, min_shards=4))) == 0
    )


def placed(storage: Path, data: str) -> TrainJob:
    of = runs.recipe(epochs=2)
    spec = RunSpec(
        recipe=of,
        placement=Placement(),
        destination=Destination(data=data, storage=str(storage), tracking="sqlite:////nowhere/x.db"),
        dataset_digest=manifest.load(data).digest(),
    )
    file_io.write_bytes(file_io.join(spec.folder, "spec.json"), spec.to_json().encode())
    return TrainJob(
        recipe=spec.recipe,
        cadence=Cadence(checkpoint_seconds=runs.NEVER, pulse_steps=1, log_steps=1),
        data=spec.destination.data,
        dataset_digest=spec.dataset_digest,
        folder=spec.folder,
        stop_flag=file_io.join(spec.folder, "stop"),
    )


def test_ilsvrc_packs_to_s3_streams_and_audits_clean(bucket: str, weather: Weather, tmp_path: Path) -> None:
    url = f"{bucket}/imagenet"
    pack(tmp_path / "raw", url)
    pack(tmp_path / "raw again", str(tmp_path / "local"))
    assert manifest.load(url).digest() == manifest.load(str(tmp_path / "local")).digest()
    assert shard_jobs.verify_dataset(VerifyConfig(url=url, deep=True)) == 0

    weather.faults = 0
    from_s3 = placed(tmp_path / "runs", url)
    assert runs.train(from_s3).status == "finished"
    assert weather.faults >= 5, "else this test shows nothing"
    retries = [event.values["train/read_retries"] for event in runs.events(from_s3, "epoch")]
    assert any(isinstance(one, float) and one >= 1 for one in retries)
    out = io.StringIO()
    assert audit.run_audit(AuditConfig(runs=(from_s3.folder,)), Console(width=200, file=out)) == 0, out.getvalue()

    from_disk = placed(tmp_path / "other runs", str(tmp_path / "local"))
    assert runs.train(from_disk).status == "finished"
    assert runs.identical(runs.final(from_s3), runs.final(from_disk)), "the place changes nothing"


def test_a_second_epoch_comes_from_the_nodes_cache(bucket: str, proxy: Proxy, tmp_path: Path) -> None:
    url = f"{bucket}/imagenet"
    pack(tmp_path / "raw", url)
    found = manifest.load(url)
    reader = SampleReader(url, found, "train", ReadingConfig(cache=str(tmp_path / "cache")))
    for epoch in range(2):
        order = EpochOrder(counts(found), 1, epoch, 4, 4)
        assert len(kept(BatchLoader(reader, 32, 2).iter_training(order, AugmentationConfig(), 1, 8, range(3)))) == 3
        if epoch == 0:
            after_first = reader.get_read_stats()
    assert reader.get_read_stats().bytes == after_first.bytes, "nothing more came from the bucket"
    assert reader.get_read_stats().cache_hits > after_first.cache_hits
    reader.close()


def test_shards_of_others_are_adopted_in_a_bucket(bucket: str, server: S3Server, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "train-%04d.tar"), maxcount=20, verbose=0) as writer:
        for sample in tiny_shards.samples(60):
            writer.write({"__key__": sample.key, "jpg": sample.image, "cls": sample.label})
    with webdataset.ShardWriter(str(folder / "val-%04d.tar"), maxcount=20, verbose=0) as writer:
        for sample in tiny_shards.samples(9, 500):
            writer.write({"__key__": sample.key, "jpg": sample.image, "cls": sample.label})
    for tar in sorted(folder.glob("*.tar")):
        file_io.write_bytes(f"{bucket}/theirs/{tar.name}", tar.read_bytes())
    job = IndexConfig(
        url=f"{bucket}/theirs", train="train-{0000..0002}.tar", validation="val-*.tar", to=f"{bucket}/adopted"
    )
    assert shard_jobs.index_tars(job) == 0
    found = manifest.load(f"{bucket}/adopted", allow_elsewhere=True)
    assert (found.count_samples("train"), found.count_samples("validation"), found.classes) == (60, 9, ("0", "1", "2"))
    loader = BatchLoader(SampleReader(f"{bucket}/adopted", found, "train"), 32, 2)
    order = EpochOrder(counts(found), 1, 0, 4, 4)
    batches = kept(loader.iter_training(order, AugmentationConfig(), 1, 10, range(6)))
    assert sorted(one for batch in batches for one in batch.ids.tolist()) == list(range(60))
    loader.close()

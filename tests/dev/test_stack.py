"""`headgate dev`: the embedded stack comes up, stays itself, heals, and leaves nothing behind."""

import base64
import json
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner
from confluent_kafka import Consumer, KafkaException, Producer
from confluent_kafka.admin import AdminClient, NewTopic
from redis import Redis

from cli.dev import group
from dev import stack as embedded
from dev import wait
from dev.stack import NotAStack, ServiceName, Stack, StackError

pytestmark = pytest.mark.broker


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    # a blank, a comma and a percent sign: each means something to one of the programs that see this path
    folder = tmp_path / "a stack, 100%"
    yield folder
    embedded.down(folder)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack for the tests that leave it as whole as they found it."""
    folder = tmp_path_factory.mktemp("own") / "stack"
    try:
        yield embedded.up(folder)
    finally:
        embedded.down(folder)


def processes_of(folder: Path) -> list[int]:
    """Every living process that works in the folder, whatever the state file says."""
    found = []
    for process in psutil.process_iter(["cwd", "status"]):
        cwd = process.info["cwd"]
        if cwd and process.info["status"] != psutil.STATUS_ZOMBIE and Path(cwd).is_relative_to(folder.resolve()):
            found.append(process.pid)
    return found


def create_topic(stack: Stack, name: str) -> None:
    admin = AdminClient({"bootstrap.servers": stack.kafka_bootstrap})
    admin.create_topics([NewTopic(name, 1, 1)])[name].result(30)


def publish(stack: Stack, topic: str, value: bytes) -> None:
    refused: list[object] = []
    producer = Producer({"bootstrap.servers": stack.kafka_bootstrap, "acks": "all"})
    producer.produce(topic, value, on_delivery=lambda error, _: refused.append(error) if error else None)
    assert producer.flush(30) == 0
    assert refused == []


def read(stack: Stack, topic: str) -> bytes:
    consumer = Consumer(
        {"bootstrap.servers": stack.kafka_bootstrap, "group.id": "reader", "auto.offset.reset": "earliest"}
    )
    try:
        consumer.subscribe([topic])
        message = consumer.poll(30)
        assert message is not None, f"nothing came from {topic}"
        if message.error():
            raise KafkaException(message.error())
        value = message.value()
        assert isinstance(value, bytes)
        return value
    finally:
        consumer.close()


def pids(stack: Stack) -> dict[str, int | None]:
    return {service.name: service.pid for service in embedded.status(stack.dir).services}


def test_up_twice_leaves_everything_as_it_is(running: Stack) -> None:
    before = pids(running)
    again = embedded.up(running.dir)
    assert again.settings() == running.settings()
    assert pids(running) == before
    assert len(processes_of(running.dir)) == 2


def test_the_settings_are_a_kafka_a_redis_and_a_development_key(running: Stack) -> None:
    assert sorted(running.settings()) == [
        "HEADGATE_DEV_DIR",
        "HEADGATE_KAFKA_BOOTSTRAP",
        "HEADGATE_MASTER_KEY_FILE",
        "HEADGATE_REDIS_URL",
    ]
    assert Redis.from_url(running.redis_url).ping()
    assert AdminClient({"bootstrap.servers": running.kafka_bootstrap}).list_topics(timeout=10).brokers
    key_id, key = running.master_key_file.read_text().strip().split(":")
    assert key_id == "dev-1"
    assert len(base64.b64decode(key, validate=True)) == 32
    assert stat.S_IMODE(running.master_key_file.stat().st_mode) == 0o600


def test_two_stacks_side_by_side_share_nothing(running: Stack, folder: Path) -> None:
    other = embedded.up(folder)
    ours = {running.kafka_port, running.redis_port}
    assert ours.isdisjoint({other.kafka_port, other.redis_port})
    create_topic(other, "only-there")
    assert (
        "only-there" not in AdminClient({"bootstrap.servers": running.kafka_bootstrap}).list_topics(timeout=10).topics
    )
    Redis.from_url(other.redis_url).set("only", "there")
    assert Redis.from_url(running.redis_url).get("only") is None

    embedded.down(folder)
    assert embedded.status(running.dir).ready


def test_down_leaves_no_process_and_no_data(folder: Path) -> None:
    stack = embedded.up(folder)
    assert len(processes_of(folder)) == 2
    assert embedded.down(folder)
    assert processes_of(folder) == []
    assert not folder.exists()
    assert list(folder.parent.iterdir()) == []
    assert wait.is_free(stack.kafka_port)
    assert wait.is_free(stack.redis_port)
    assert not embedded.down(folder)  # a second time there is nothing to do


def test_down_keep_keeps_data_ports_and_key(folder: Path) -> None:
    stack = embedded.up(folder)
    key = stack.master_key_file.read_bytes()
    create_topic(stack, "kept")
    publish(stack, "kept", b"still here")
    Redis.from_url(stack.redis_url).set("kept", "too")

    embedded.down(folder, keep=True)
    assert processes_of(folder) == []
    assert not embedded.status(folder).ready

    again = embedded.up(folder)
    assert again.settings() == stack.settings()
    assert again.master_key_file.read_bytes() == key
    assert read(again, "kept") == b"still here"
    assert Redis.from_url(again.redis_url).get("kept") == b"too"


def test_a_killed_broker_comes_back_on_its_port_with_its_data(running: Stack) -> None:
    create_topic(running, "survives")
    publish(running, "survives", b"before the kill")
    running.stop_kafka(kill=True)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", running.kafka_port), 5)
    running.start_kafka()
    assert read(running, "survives") == b"before the kill"


def test_the_broker_starts_from_the_class_archive(running: Stack) -> None:
    # a virtual machine that refuses an archive says nothing and starts in twice the time
    broker = pids(running)["kafka"]
    assert "/kafka.jsa\n" in Path(f"/proc/{broker}/maps").read_text()


def test_up_starts_what_has_died_and_wakes_what_is_paused(running: Stack) -> None:
    before = pids(running)
    running.stop_redis(kill=True)
    running.pause(ServiceName.KAFKA)
    assert [service.condition for service in embedded.status(running.dir).services] == ["paused", "stopped"]

    assert embedded.up(running.dir).settings() == running.settings()
    assert embedded.status(running.dir).ready
    assert pids(running)["kafka"] == before["kafka"]
    assert pids(running)["redis"] != before["redis"]


def test_concurrent_ups_make_one_stack_and_concurrent_downs_end_it(folder: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        stacks = list(pool.map(embedded.up, [folder] * 3))
        assert stacks[0] == stacks[1] == stacks[2]
        assert len(processes_of(folder)) == 2
        ended = list(pool.map(embedded.down, [folder] * 3))
    assert ended.count(True) == 1
    assert processes_of(folder) == []
    assert list(folder.parent.iterdir()) == []


@pytest.mark.parametrize("whose", ["somebody else's", "ours"])
def test_a_pid_that_now_belongs_to_somebody_else_is_never_signalled(whose: str, folder: Path) -> None:
    embedded.up(folder)
    embedded.down(folder, keep=True)
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        state_file = folder / "state.json"
        state = json.loads(state_file.read_text())
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        ticks = int(Path(f"/proc/{bystander.pid}/stat").read_text().rsplit(")", 1)[1].split()[19])
        # the control: with the moment of its start the same pid is taken for ours, and ended
        started = ticks if whose == "ours" else ticks - 1
        state["processes"] = {"redis": {"pid": bystander.pid, "started": f"{boot}/{started}"}}
        state_file.write_text(json.dumps(state))
        embedded.down(folder)
        assert (bystander.poll() is None) == (whose != "ours")
    finally:
        bystander.kill()
        bystander.wait()


def test_a_folder_that_is_not_ours_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("the only copy")
    for action in (embedded.up, embedded.down):
        with pytest.raises(NotAStack, match=r"thesis\.txt"):
            action(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(NotAStack):
        embedded.down(empty)
    assert empty.is_dir()


def test_a_taken_port_is_named_rather_than_changed(folder: Path) -> None:
    stack = embedded.up(folder)
    embedded.down(folder, keep=True)
    with socket.create_server(("127.0.0.1", stack.redis_port)), pytest.raises(StackError) as refused:
        embedded.up(folder)
    assert f"port {stack.redis_port} of this stack's redis is taken" in str(refused.value)
    assert embedded.up(folder).settings() == stack.settings()


# The command


def headgate_dev(*arguments: str, folder: Path) -> tuple[int, str, str]:
    result = CliRunner(env={"HEADGATE_DEV_DIR": str(folder)}).invoke(group, arguments)
    return result.exit_code, result.stdout, result.stderr


def test_dev_up_prints_settings_that_a_shell_reads_back(folder: Path) -> None:
    code, out, _ = headgate_dev("up", folder=folder)
    assert code == 0
    assert [line.partition("=")[0] for line in out.splitlines()] == [
        "HEADGATE_KAFKA_BOOTSTRAP",
        "HEADGATE_REDIS_URL",
        "HEADGATE_MASTER_KEY_FILE",
        "HEADGATE_DEV_DIR",
    ]
    shell = subprocess.run(
        ["bash", "-c", 'eval "$1"; printf %s "$HEADGATE_DEV_DIR"', "-", out], capture_output=True, text=True, check=True
    )
    assert shell.stdout == str(folder)

    code, out, _ = headgate_dev("up", "--output", "json", folder=folder)
    assert json.loads(out)["HEADGATE_DEV_DIR"] == str(folder)
    code, out, _ = headgate_dev("status", "--output", "json", folder=folder)
    assert (code, [service["condition"] for service in json.loads(out)["services"]]) == (0, ["ready", "ready"])
    assert headgate_dev("down", folder=folder)[:2] == (0, "")
    assert headgate_dev("status", folder=folder)[0] == 1
    assert headgate_dev("down", folder=folder)[0] == 0


def test_wrong_use_exits_2_and_a_fault_1_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    code, out, err = headgate_dev("down", folder=tmp_path)
    assert (code, out) == (2, "")
    assert "nothing in it was touched" in err
    code, out, err = headgate_dev("up", "--with", "s3,gcs", folder=tmp_path / "new")
    assert (code, out) == (2, "")
    assert "unknown service 'gcs'; known are s3, bigquery" in err
    assert not (tmp_path / "new").exists()
    code, out, err = headgate_dev("up", folder=Path("/proc/nowhere"))
    assert (code, out) == (1, "")
    assert "/proc/nowhere: No such file or directory; name a folder that you may write to by HEADGATE_DEV_DIR" in err
    with pytest.raises(StackError, match="HEADGATE_DEV_DIR"):  # as the demo calls it
        embedded.up(Path("/proc/nowhere"))

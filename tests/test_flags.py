"""XLA flags: the present XLA takes them, the user's own win, and one that XLA does not know does not end the process."""

import importlib.util
import os
import subprocess
import sys

import jax
import pytest

from dgpo_jax import flags, session
from dgpo_jax.config import Config, NoOptions
from dgpo_jax.flags import DETERMINISTIC, FLAGS, Flag, installed_backends, known_to_jaxlib, names_in, set_flags
from dgpo_jax.plan import compiler_line


def test_all_flags_of_a_backend_are_added_to_its_variable():
    environment = {}
    added = set_flags(["tpu", "gpu"], environment)
    assert environment["XLA_FLAGS"].split() == added["XLA_FLAGS"] == [f"--{flag.name}={flag.value}" for flag in FLAGS["gpu"]]
    undefok, *rest = environment["LIBTPU_INIT_ARGS"].split()
    assert rest == added["LIBTPU_INIT_ARGS"]
    assert undefok == "--undefok=" + ",".join(flag.name for flag in FLAGS["tpu"])


@pytest.mark.parametrize("given", [
    "--xla_gpu_enable_latency_hiding_scheduler=false",
    "--noxla_gpu_enable_latency_hiding_scheduler",
    "-xla_gpu_enable_latency_hiding_scheduler",
])
def test_a_flag_of_the_user_is_never_touched(given):
    environment = {"XLA_FLAGS": f"--xla_dump_to=/tmp/x {given}"}
    added = set_flags(["gpu"], environment)
    assert environment["XLA_FLAGS"].split()[-2:] == ["--xla_dump_to=/tmp/x", given]  # last, where repeated flags win
    assert not any("latency_hiding" in flag for flag in added["XLA_FLAGS"])
    assert environment["XLA_FLAGS"].count("latency_hiding") == 1


def test_setting_them_twice_adds_nothing_the_second_time():
    environment = {}
    set_flags(["tpu", "gpu"], environment)
    before = dict(environment)
    assert set_flags(["tpu", "gpu"], environment) == {}
    assert environment == before


def test_they_can_be_switched_off():
    environment = {"DGPO_JAX_FLAGS": "0"}
    assert set_flags(["tpu", "gpu"], environment) == {}
    assert environment == {"DGPO_JAX_FLAGS": "0"}


def test_names_are_read_off_however_they_are_written():
    assert names_in("--a=1  -b --noc=") >= {"a", "b", "c"}
    assert names_in("") == set()


@pytest.mark.parametrize("platforms, modules, expected", [
    ("", {"libtpu"}, ["tpu"]),
    ("cpu", {"libtpu", "jax_cuda12_plugin"}, []),  # told to use the CPU: its cache of compiled programs keeps its keys
    ("tpu,cpu", {"libtpu", "jax_cuda12_plugin"}, ["tpu"]),
    ("cuda", {"libtpu", "jax_cuda13_plugin"}, ["gpu"]),
    ("", set(), []),
])
def test_flags_are_only_for_backends_that_can_start(monkeypatch, platforms, modules, expected):
    monkeypatch.setattr(flags, "_installed", lambda module: module in modules)
    assert installed_backends({"JAX_PLATFORMS": platforms}) == expected


def test_a_gpu_flag_that_this_jaxlib_has_not_is_left_out(monkeypatch):
    unknown, real = Flag("xla_gpu_no_such_flag_in_any_version", "1", ""), FLAGS["gpu"][0]
    assert known_to_jaxlib([unknown, real]) == [real]
    monkeypatch.setitem(FLAGS, "gpu", (unknown, real))
    assert set_flags(["gpu"], {}) == {"XLA_FLAGS": [f"--{real.name}={real.value}"]}


def test_the_present_xla_takes_the_gpu_flags_and_would_refuse_others():
    # The flags of all backends are parsed wherever a backend starts, so a CPU can tell.
    def start(arguments):
        program = "import jax; print(jax.numpy.ones(2).sum())"
        environment = os.environ | {"XLA_FLAGS": arguments, "JAX_PLATFORMS": "cpu"}
        return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)

    environment = {}
    set_flags(["gpu"], environment)
    assert start(environment["XLA_FLAGS"]).stdout == "2.0\n"
    assert len(environment["XLA_FLAGS"].split()) == len(FLAGS["gpu"])  # none was left out
    assert "no_such_flag" in start("--xla_gpu_no_such_flag=true").stderr


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_libtpu_takes_the_tpu_flags_and_passes_over_those_it_does_not_know():
    program = (
        "from dgpo_jax.flags import *\n"
        "FLAGS['tpu'] += (Flag('xla_tpu_no_such_flag', 'true', ''),) * UNKNOWN\n"
        "environment = {}; set_flags(['tpu'], environment)\n"
        "import os; os.environ['LIBTPU_INIT_ARGS'] = ' '.join(environment['LIBTPU_INIT_ARGS'].split()[SKIP:])\n"
        "from jax.experimental.topologies import get_topology_desc\n"
        "print(len(get_topology_desc(platform='tpu', topology_name='v5e:2x2').devices))"
    )

    def start(unknown, skip):
        text = program.replace("UNKNOWN", str(unknown)).replace("SKIP", str(skip))
        environment = os.environ | {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
        return subprocess.run([sys.executable, "-c", text], env=environment, capture_output=True, text=True, cwd=os.getcwd())

    assert start(unknown=1, skip=0).stdout == "4\n"
    assert start(unknown=0, skip=1).stdout == "4\n"  # without --undefok: libtpu knows every one of ours
    assert start(unknown=1, skip=1).stdout == ""  # it would have ended the process


@pytest.mark.parametrize("ours", ["", "0"])
def test_a_deterministic_run_gets_its_flag_even_where_none_of_the_fast_ones_are_wanted(ours, monkeypatch):
    monkeypatch.setattr("dgpo_jax.flags.known_to_jaxlib", list)
    environment = {"DGPO_JAX_FLAGS": ours} if ours else {}
    set_flags(["gpu", "tpu"], environment, deterministic=True)
    flags = environment["XLA_FLAGS"].split()
    assert "--xla_gpu_deterministic_ops=true" in flags
    assert (len(flags) == 1) == (ours == "0")  # TPUs repeat themselves anyway


def test_jaxlib_knows_the_deterministic_flag():
    assert known_to_jaxlib(DETERMINISTIC["gpu"]) == list(DETERMINISTIC["gpu"])


def test_a_command_sets_them_before_its_story_begins(monkeypatch):
    order = []
    monkeypatch.setattr(session, "parse_command", lambda *_, **__: (Config(), "workdir", NoOptions()))
    monkeypatch.setattr(session, "set_flags", lambda deterministic: order.append("flags"))
    monkeypatch.setattr(session, "use_compilation_cache", lambda: order.append("cache"))  # a setting of the whole process
    session.run_command("program", "", lambda config, workdir: order.append("story"))
    assert order == ["flags", "cache", "story"]


@pytest.mark.parametrize("platform, environment, expected", [
    ("tpu", {"LIBTPU_INIT_ARGS": "--undefok=a --a=true --b=1"}, "keeps programs in /there, --a=true --b=1"),
    ("gpu", {"XLA_FLAGS": "--c=2", "LIBTPU_INIT_ARGS": "--a=true"}, "keeps programs in /there, --c=2"),
    ("cpu", {}, "keeps programs in /there, no flags"),
])
def test_the_plan_says_where_programs_are_kept_and_which_flags_the_compiler_gets(monkeypatch, platform, environment, expected):
    for variable in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):
        monkeypatch.setenv(variable, environment.get(variable, ""))
    before = {name: getattr(jax.config, name) for name in ("jax_compilation_cache_dir", "jax_enable_compilation_cache")}
    jax.config.update("jax_compilation_cache_dir", "/there")
    jax.config.update("jax_enable_compilation_cache", True)  # other tests may have switched it off
    try:
        assert compiler_line(platform) == expected
    finally:
        for name, value in before.items():
            jax.config.update(name, value)

#!/usr/bin/env bash
# Make .venv and install what a program needs, once: bash tools/setup.sh train|chat|cpu|gptq|test|all
# all: every part that is not for tests; gptq makes each start slower, so take it only if you use it.
# The entries call this on first use. requirements.txt fixes every version. PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
what=${1:-}
case "$what" in
  train | chat | cpu | gptq | test) extras=$what ;;
  all) extras=train,wandb,chat,cpu,gptq ;;
  *) echo "error: tools/setup.sh: unknown part '$what'. Use: bash tools/setup.sh train|chat|cpu|gptq|test|all" >&2; exit 2 ;;
esac

python=${PYTHON:-python3}
if ! command -v "$python" >/dev/null; then
  echo "error: $python was not found. Install Python 3.11 or newer, or set PYTHON to its path." >&2
  exit 2
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "error: OneCard needs Python 3.11 or newer, $python is $("$python" -V 2>&1 | cut -d" " -f2). Install a newer one, or set PYTHON to its path." >&2
  exit 2
fi

# fail PROBLEM [WORDS]: words of another program, if it had any, stand above our own line
fail() {
  [ -n "${2:-}" ] && printf '%s\n' "$2" >&2
  echo "error: $1" >&2
  exit 2
}
trap 'echo "stopped by Ctrl-C. Run the same command again to go on." >&2; exit 130' INT

# starts ENVIRONMENT: whether the folder is an environment, of venv or of conda, whose Python starts
starts() {
  "$1/bin/python" -c '
import pathlib, sys
sys.exit(sys.prefix == sys.base_prefix and not pathlib.Path(sys.prefix, "conda-meta").is_dir())
' 2>/dev/null
}

# drop_unfinished ENVIRONMENT: what a stopped pip left there. pip writes INSTALLER when the files of a package are in
# their places, and keeps what it replaces under a name that begins with ~.
drop_unfinished() {
  "$1/bin/python" -c '
import pathlib, shutil, sysconfig
packages = pathlib.Path(sysconfig.get_path("purelib"))
unfinished = [info for info in packages.glob("*.dist-info") if not (info / "INSTALLER").is_file()]
for folder in [*packages.glob("~*"), *unfinished]:
    shutil.rmtree(folder, ignore_errors=True)
'
}

# has_pip: whether .venv has all of pip, and it runs
has_pip() {
  .venv/bin/python -m pip --version >/dev/null 2>&1 &&
    .venv/bin/python -c 'import importlib.metadata; importlib.metadata.version("pip")' 2>/dev/null
}

# put_pip_back: the pip that comes with Python, in the place of what is left of one
put_pip_back() {
  .venv/bin/python -c '
import pathlib, shutil, sysconfig
packages = pathlib.Path(sysconfig.get_path("purelib"))
for folder in [packages / "pip", *packages.glob("pip-*.dist-info")]:
    shutil.rmtree(folder, ignore_errors=True)
' && .venv/bin/python -m ensurepip --upgrade --default-pip && has_pip
}

stamp=.venv/onecard-$what-$(cat requirements.txt pyproject.toml | cksum | cut -d" " -f1)
[ -e "$stamp" ] && starts .venv && exit 0

echo "Setting up .venv for '$what' (once; a few minutes) ..."
no_venv="On Debian and Ubuntu it needs a package: apt install python3-venv"
# venv writes bin/activate last; Python's words are kept back, since after Ctrl-C they are a page of traceback
if ! starts .venv || { [ ! -e .venv/bin/activate ] && [ ! -d .venv/conda-meta ]; }; then
  if [ -L .venv ]; then
    fail ".venv is a link to $(readlink .venv), which is no whole environment. Remove the link, then run the same command again."
  fi
  if [ -e .venv ]; then echo "The Python in .venv does not start, or .venv was never finished: it is made again."; fi
  words=$("$python" -m venv --clear .venv 2>&1) || fail "$python could not make .venv; its reason is above. $no_venv" "$words"
fi
drop_unfinished .venv
if ! has_pip; then
  echo "pip is missing in .venv, or was never finished: it is put back."
  words=$(put_pip_back 2>&1) || fail "Python could not put pip into .venv; its reason is above. $no_venv" "$words"
fi
words=$(.venv/bin/python -m pip install --quiet "pip==26.3" 2>&1) ||
  fail "pip could not fetch its version 26.3; its reason is above. If that is the network, check it. Then run the same command again." "$words"
# llama.cpp is compiled here (minutes); code for exactly this processor would crash on those that announce AMX
# (llama.cpp issue 20824), so it is built for any of the last ten years
export CMAKE_ARGS="-DGGML_NATIVE=OFF ${CMAKE_ARGS:-}"
if ! .venv/bin/python -m pip install -c requirements.txt -e ".[$extras]"; then
  echo "error: the packages could not be installed; what pip says is above. Run the same command again to go on." >&2
  exit 2
fi
if [ "$what" = test ] && ! .venv/bin/python -m pip install -c requirements.txt --no-build-isolation deepspeed; then
  echo "error: DeepSpeed could not be installed; what pip says is above. Run the same command again to go on." >&2
  exit 2
fi
apart=.venv/gptq # beside .venv's packages: where gptqmodel is installed it is imported at every start
add_gptqmodel() {
  local packages='import sysconfig; print(sysconfig.get_path("purelib"))'
  if [ ! -e "$apart/whole" ]; then .venv/bin/python -m venv --clear --without-pip "$apart" || return; fi
  printf '%s\n' "$(.venv/bin/python -c "$packages")" "$PWD" >"$("$apart/bin/python" -c "$packages")/beside.pth" &&
    "$apart/bin/python" -m pip install -c requirements.txt gptqmodel optimum &&
    touch "$apart/whole"
}
if [ "$what" = test ] && ! add_gptqmodel; then
  rm -rf "$apart"
  echo "gptqmodel could not be installed; its tests are left out."
fi
if [ "$what" = test ] && ! command -v strace >/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
  echo "Installing strace, which kills a save at each of its system calls (without it these tests are left out) ..."
  { apt-get update && apt-get install --yes --no-install-recommends strace; } >/dev/null || echo "strace could not be installed."
fi
if [[ "$what" = cpu || "$what" = all ]] && ! .venv/bin/python -c "from onecard.conversion import llama_cpp_converter; llama_cpp_converter.home()"; then
  echo "error: llama.cpp's converter could not be fetched; what was said is above. Run the same command again to go on." >&2
  exit 2
fi
browser() { command -v chromium || command -v chromium-browser || command -v google-chrome; }
if [ "$what" = test ] && ! browser >/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
  echo "Installing Chromium, in which the windows are tested (without it these tests are left out) ..."
  { apt-get update && apt-get install --yes --no-install-recommends chromium fonts-noto-cjk; } >/dev/null || echo "Chromium could not be installed."
fi
touch "$stamp" # written last: it means complete
case "$what" in # what else is complete with it
  test) touch "${stamp/-test-/-train-}" "${stamp/-test-/-chat-}" "${stamp/-test-/-cpu-}" ;;
  all) touch "${stamp/-all-/-train-}" "${stamp/-all-/-chat-}" "${stamp/-all-/-cpu-}" "${stamp/-all-/-gptq-}" ;;
  chat | cpu | gptq) touch "${stamp/-$what-/-train-}" ;;
esac

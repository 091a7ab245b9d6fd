#!/usr/bin/env bash
# Make .venv and install what a program needs, once: bash tools/setup.sh train|chat|cpu|gptq|test
# The entries call this on first use. requirements.txt fixes every version. PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
what=${1:-}
case "$what" in
  train | chat | cpu | gptq | test) ;;
  *) echo "error: tools/setup.sh: unknown part '$what'. Use: bash tools/setup.sh train|chat|cpu|gptq|test" >&2; exit 2 ;;
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

stamp=.venv/onecard-$what-$(cat requirements.txt pyproject.toml | cksum | cut -d" " -f1)
[ -e "$stamp" ] && exit 0

echo "Setting up .venv for '$what' (once; a few minutes) ..."
if [ ! -x .venv/bin/python ] && ! "$python" -m venv .venv; then
  rm -rf .venv # what is there has no pip and would be taken for whole
  echo "error: $python could not make .venv. On Debian or Ubuntu: apt install python3-venv" >&2
  exit 2
fi
.venv/bin/python -m pip install --quiet "pip==26.3" || { echo "error: pip could not reach the package index; check the network." >&2; exit 2; }
# llama.cpp is compiled here (minutes); code for exactly this processor would crash on those that announce AMX
# (llama.cpp issue 20824), so it is built for any of the last ten years
export CMAKE_ARGS="-DGGML_NATIVE=OFF ${CMAKE_ARGS:-}"
if ! .venv/bin/python -m pip install -c requirements.txt -e ".[$what]"; then
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
  .venv/bin/python -m venv --without-pip "$apart" &&
    printf '%s\n' "$(.venv/bin/python -c "$packages")" "$PWD" >"$("$apart/bin/python" -c "$packages")/beside.pth" &&
    "$apart/bin/python" -m pip install -c requirements.txt gptqmodel optimum
}
if [ "$what" = test ] && ! add_gptqmodel; then
  rm -rf "$apart"
  echo "gptqmodel could not be installed; its tests are left out."
fi
if [ "$what" = test ] && ! command -v strace >/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
  echo "Installing strace, which kills a save at each of its system calls (without it these tests are left out) ..."
  { apt-get update && apt-get install --yes --no-install-recommends strace; } >/dev/null || echo "strace could not be installed."
fi
if [ "$what" = cpu ] && ! .venv/bin/python -c "from onecard import converter; converter.home()"; then
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
  chat | cpu | gptq) touch "${stamp/-$what-/-train-}" ;;
esac

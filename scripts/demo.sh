#!/usr/bin/env bash
# The four commands on the model that ships with moepack, in a workspace that is removed again.
set -euo pipefail

MOEPACK_HOME=$(mktemp -d "${TMPDIR:-/var/tmp}/moepack-demo.XXXXXX")
export MOEPACK_HOME
trap 'rm -rf "$MOEPACK_HOME"' EXIT

step() {
  printf '\n$ moepack'
  for argument in "$@"; do
    case $argument in
      *' '*) printf ' "%s"' "$argument" ;;
      *) printf ' %s' "$argument" ;;
    esac
  done
  printf '\n'
  moepack "$@"
}

step profile
step plan --vram 16M --context 1024
step pack
step run "In the beginning" --temperature 0.8 --seed 1 --stats
step bench

# Sourced by the scripts that leave out what is finished.

refuse() { # with one line
    echo "error: $1" >&2
    exit 2
}

expanded() { # a path whose ~ the commands expand themselves
    echo "${1/#\~\//$HOME/}"
}

once() { # RESULT INPUT ... -- COMMAND ...: unless the result is there and younger than all inputs
    local result=$1 input old=""
    shift
    [ -f "$result" ] || old=yes
    while [ "$1" != -- ]; do
        [ "$result" -nt "$1" ] || old=yes
        shift
    done
    shift
    if [ -z "$old" ]; then
        echo "$result is there"
        return
    fi
    "$@"
}

# Sourced by the scripts that run commands of recipes.env.
source "${BASH_SOURCE[0]%.sh}.env"

# recipe FAMILY NAME ...: sets each variable NAME to the words of its row. Expand it without quotes: words hold neither
# blanks nor wildcards.
recipe() {
    local family=$1 name words
    shift
    for name in "$@"; do
        words=$(_words "$name") || return 1
        printf -v "$name" '%s' "$(echo $words)"
    done
}

_words() { # of one row of $family, one on a line
    local own=${family}_$1 all=all_$1 word
    for word in ${!own-${!all?no row $all in recipes.env}}; do
        case "$word" in
            @*) _words "${word#@}" ;;
            *) echo "$word" ;;
        esac
    done
}

package gateway

import (
	"bytes"
	"fmt"
	"math"

	"holdfast/internal/mqtt"
)

// routes decides by topic which lane a message goes to: the first filter in the order of the
// configuration that matches, by the rules of MQTT 5.0 §4.7.
//
// The filters are a tree by levels, so a topic costs a walk along its own levels, however many
// filters there are: a node is visited at most once, those below which no earlier filter lies not
// at all. Nothing in it changes after newRoutes, so many goroutines may ask at once.
type routes[T any] struct {
	nodes   []routeNode // 0 is the root
	targets []T
	rest    T // what no filter matches
}

// none is the rank of a filter that is not there; ranks are places in the configuration.
const none = math.MaxInt32

type routeNode struct {
	first   int32            // lowest rank of all filters that end here or below
	end     int32            // rank of the filter that ends here
	many    int32            // rank of the filter that ends in '#' here
	one     int32            // child for '+'; 0: none, the root is nobody's child
	literal map[string]int32 // children by level; nil: none
}

type route[T any] struct {
	filter string
	target T
}

func newRoutes[T any](table []route[T], rest T) (*routes[T], error) {
	r := &routes[T]{rest: rest}
	r.add()
	for rank, e := range table {
		if !mqtt.ValidFilter(e.filter) || bytes.HasPrefix([]byte(e.filter), []byte("$share/")) {
			return nil, fmt.Errorf("route %d: %q is no topic filter", rank, e.filter)
		}
		r.targets = append(r.targets, e.target)
		r.insert(e.filter, int32(rank))
	}
	return r, nil
}

func (r *routes[T]) add() int32 {
	r.nodes = append(r.nodes, routeNode{first: none, end: none, many: none})
	return int32(len(r.nodes) - 1)
}

func (r *routes[T]) insert(filter string, rank int32) {
	at := int32(0)
	r.nodes[0].first = min(r.nodes[0].first, rank)
	for rest, more := filter, true; more; {
		var level string
		level, rest, more = cutLevel(rest)
		if level == "#" {
			r.nodes[at].many = min(r.nodes[at].many, rank)
			return
		}
		at = r.child(at, level)
		r.nodes[at].first = min(r.nodes[at].first, rank)
	}
	r.nodes[at].end = min(r.nodes[at].end, rank)
}

func (r *routes[T]) child(at int32, level string) int32 {
	if level == "+" {
		if r.nodes[at].one == 0 {
			n := r.add()
			r.nodes[at].one = n
		}
		return r.nodes[at].one
	}
	if n, ok := r.nodes[at].literal[level]; ok {
		return n
	}
	n := r.add()
	if r.nodes[at].literal == nil {
		r.nodes[at].literal = map[string]int32{}
	}
	r.nodes[at].literal[level] = n
	return n
}

// match gives the target of the first filter that matches topic. It allocates nothing.
func (r *routes[T]) match(topic []byte) T {
	wild := len(topic) == 0 || topic[0] != '$' // wildcards do not match a leading $ (MQTT 5.0 §4.7.2)
	if best := r.walk(0, topic, true, wild, none); best != none {
		return r.targets[best]
	}
	return r.rest
}

// walk gives the lower of best and the rank of the first filter at or below node n that matches
// the levels in rest; more is false when there are none left.
func (r *routes[T]) walk(n int32, rest []byte, more, wild bool, best int32) int32 {
	node := &r.nodes[n]
	if node.first >= best {
		return best
	}
	if wild {
		best = min(best, node.many) // also for the level above: a/# matches a
	}
	if !more {
		return min(best, node.end)
	}
	level, rest, more := cutLevel(rest)
	if child, ok := node.literal[string(level)]; ok {
		best = r.walk(child, rest, more, true, best)
	}
	if node.one != 0 && wild {
		best = r.walk(node.one, rest, more, true, best)
	}
	return best
}

// cutLevel splits the first level off; more tells whether there is another, which may be empty.
func cutLevel[S ~string | ~[]byte](topic S) (level, rest S, more bool) {
	for i := range len(topic) {
		if topic[i] == '/' {
			return topic[:i], topic[i+1:], true
		}
	}
	return topic, topic[len(topic):], false
}

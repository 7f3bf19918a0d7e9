package wire

import (
	"encoding/json"
	"fmt"
)

// Gap announces messages that an upstream will not get, because a rule took them or because they
// were damaged: the payload of gw/{gateway}/evt/gap.
type Gap struct {
	Gateway  string `json:"gateway"`
	Epoch    string `json:"epoch"`
	Lane     string `json:"lane"`
	Upstream string `json:"upstream"` // the upstream that will not get them
	First    uint64 `json:"first"`    // sequences, both inclusive
	Last     uint64 `json:"last"`
	Count    uint64 `json:"count"`   // at most Last-First+1: less if part of the range had ended otherwise
	Bytes    uint64 `json:"bytes"`   // of records; 0 where nobody can tell any more
	FromMS   int64  `json:"from_ms"` // receive times of the first and the last, Unix ms; 0: unknown
	ToMS     int64  `json:"to_ms"`
	Reason   string `json:"reason"` // max_bytes, max_age, damaged, detached; more may follow
}

// State is a gateway's birth or death: the retained payload of gw/{gateway}/state.
type State struct {
	State   string `json:"state"` // StateOnline or StateOffline
	Epoch   string `json:"epoch"`
	Version string `json:"version"` // of the program
	TS      int64  `json:"ts"`      // Unix ms; of a last will: when the connection was made
}

// The two states.
const (
	StateOnline  = "online"
	StateOffline = "offline"
)

// DecodeGap reads a gap announcement. Fields it does not know are skipped.
func DecodeGap(b []byte) (Gap, error) {
	var g Gap
	if err := json.Unmarshal(b, &g); err != nil {
		return Gap{}, fmt.Errorf("gap: %w: %v", ErrFormat, err)
	}
	if g.Gateway == "" || g.Epoch == "" || g.Lane == "" {
		return Gap{}, fmt.Errorf("gap: %w: gateway, epoch or lane is missing", ErrFormat)
	}
	if g.First == 0 || g.Last < g.First || g.Count == 0 || g.Count-1 > g.Last-g.First {
		return Gap{}, fmt.Errorf("gap: %w: %d messages from sequence %d to %d", ErrFormat, g.Count, g.First, g.Last)
	}
	return g, nil
}

// DecodeState reads a gateway's birth or death. Fields it does not know are skipped.
func DecodeState(b []byte) (State, error) {
	var s State
	if err := json.Unmarshal(b, &s); err != nil {
		return State{}, fmt.Errorf("state: %w: %v", ErrFormat, err)
	}
	if s.State != StateOnline && s.State != StateOffline {
		return State{}, fmt.Errorf("state: %w: %.40q is neither online nor offline", ErrFormat, s.State)
	}
	return s, nil
}

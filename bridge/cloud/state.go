package cloud

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"holdfast/bridge/wire"
)

// stateVersion is the newest version of a receiver's state that this package reads.
// Written to disk: never renumber, never reuse.
//
//	2  sent, which in version 1 is max
const stateVersion = 2

type stateJSON struct {
	Version int         `json:"version"`
	Lanes   []trackJSON `json:"lanes"` // the one used last is first
}

type trackJSON struct {
	Gateway   string `json:"gateway"`
	Epoch     string `json:"epoch"`
	Lane      string `json:"lane"`
	Floor     uint64 `json:"floor"`
	Base      uint64 `json:"base"`
	Max       uint64 `json:"max"`
	Sent      uint64 `json:"sent"` // from version 2 on
	Missing   uint64 `json:"missing"`
	Seen      ranges `json:"seen"`
	Announced ranges `json:"announced"`
}

// MarshalJSON writes down what has been seen, for UnmarshalJSON. Counters are not part of it. A program that stores
// messages in a database stores this in the same transaction: then nothing is seen twice or never.
func (r *Receiver) MarshalJSON() ([]byte, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := stateJSON{Version: stateVersion, Lanes: make([]trackJSON, 0, len(r.lanes))}
	for e := r.recent.Front(); e != nil; e = e.Next() {
		t := e.Value.(*track)
		s.Lanes = append(s.Lanes, trackJSON{
			t.key.gateway, t.key.epoch, t.key.lane, t.floor, t.base, t.max, t.sent, t.missing, t.seen, t.announced,
		})
	}
	return json.Marshal(s)
}

// UnmarshalJSON replaces what has been seen by what MarshalJSON wrote down. An error (wire.ErrVersion,
// wire.ErrFormat) changes nothing.
func (r *Receiver) UnmarshalJSON(b []byte) error {
	var v struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(b, &v); err != nil {
		return fmt.Errorf("receiver's state: %w: %v", wire.ErrFormat, err)
	}
	if v.Version > stateVersion {
		return fmt.Errorf("receiver's state: version %d: %w", v.Version, wire.ErrVersion)
	}
	var s stateJSON
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&s); err != nil {
		return fmt.Errorf("receiver's state: %w: %v", wire.ErrFormat, err)
	}
	if s.Version < 1 {
		return fmt.Errorf("receiver's state: %w: version %d", wire.ErrFormat, s.Version)
	}
	fresh := New(Config{r.maxRaw, r.maxRanges, r.maxLanes})
	for i := len(s.Lanes) - 1; i >= 0; i-- {
		l := s.Lanes[i]
		t := track{laneKey{l.Gateway, l.Epoch, l.Lane}, l.Floor, l.Base, l.Max, l.Sent, l.Seen, l.Announced, l.Missing}
		if s.Version == 1 {
			t.sent = t.max
		}
		if err := t.check(); err != nil {
			return fmt.Errorf("receiver's state: lane %s of %s: %w: %v", l.Lane, l.Gateway, wire.ErrFormat, err)
		}
		kept := fresh.track(t.key)
		key := kept.key
		*kept = t
		kept.key = key
		kept.bound(r.maxRanges)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lanes, r.recent = fresh.lanes, fresh.recent
	return nil
}

// check holds what was read to what come and announce keep up.
func (t *track) check() error {
	for name, set := range map[string]ranges{"seen": t.seen, "announced": t.announced} {
		if !set.valid() {
			return fmt.Errorf("%s is not a list of rising ranges", name)
		}
		if len(set) > 0 && set[0].First <= t.floor {
			return fmt.Errorf("%s begins at or below floor %d", name, t.floor)
		}
	}
	if n := len(t.seen); n > 0 && t.seen[n-1].Last != t.max || n == 0 && t.floor < t.max {
		return fmt.Errorf("max is %d, but the highest that was seen is not", t.max)
	}
	if t.sent > t.max || t.sent < max(t.base, t.floor) || t.base > t.max {
		return fmt.Errorf("floor %d, base %d, sent %d and max %d do not fit", t.floor, t.base, t.sent, t.max)
	}
	var open uint64
	for _, h := range t.holes() {
		open += h.Count()
	}
	// What was settled while it was missing is still counted.
	if t.missing < open || t.missing-open > t.floor {
		return fmt.Errorf("%d are said to be missing, %d are", t.missing, open)
	}
	return nil
}

// Save writes what has been seen to a file, so that a program that starts again with Load sees nothing
// twice: the old file, or the new one whole and on stable storage.
func (r *Receiver) Save(file string) error {
	b, err := r.MarshalJSON()
	if err != nil {
		return fmt.Errorf("save receiver's state: %w", err)
	}
	dir := filepath.Dir(file)
	tmp, err := os.CreateTemp(dir, filepath.Base(file)+".*.tmp") // mode 0600
	if err != nil {
		return fmt.Errorf("save receiver's state: %w", err)
	}
	_, err = tmp.Write(append(b, '\n'))
	if err = errors.Join(err, tmp.Sync(), tmp.Close()); err == nil {
		err = os.Rename(tmp.Name(), file)
	}
	if err != nil {
		return fmt.Errorf("save receiver's state: %w", errors.Join(err, os.Remove(tmp.Name())))
	}
	d, err := os.Open(dir) // the new name is stable only when the folder is
	if err != nil {
		return fmt.Errorf("save receiver's state: %w", err)
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return fmt.Errorf("save receiver's state: %w", err)
	}
	return nil
}

// Load reads what Save wrote. A file that does not exist is a receiver that has seen nothing.
func (r *Receiver) Load(file string) error {
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("load receiver's state: %w", err)
	}
	if err := r.UnmarshalJSON(b); err != nil {
		return fmt.Errorf("load %s (move it away to begin anew, and see messages that are sent again once more): %w", file, err)
	}
	return nil
}

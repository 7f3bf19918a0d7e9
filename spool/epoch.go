package spool

import (
	"encoding/json"
	"fmt"
	"math"
	"slices"

	"github.com/google/uuid"

	"holdfast/internal/kv"
)

// A store that was restored from a backup must not go on under the epoch that it finds in it: since the backup was made, the
// sequences that come next were given to other messages, and a receiver would drop the new ones as repeats. So the epoch
// changes, but only from there on: what is in the backup keeps its ids, and whoever has it already knows it by them.
// Sequences go on counting, so that a lane stays without holes.

// pastEpoch is an epoch that has ended.
type pastEpoch struct {
	ID string `json:"id"`
	// Cause is the id of the backup whose restore ended it.
	Cause string `json:"cause"`
	// Until has, by lane number, where the next epoch begins. Of a lane that is not there, nothing is of this epoch.
	Until map[byte]Position `json:"until"`
}

// maxPastEpochs bounds the row; nobody restores as often.
const maxPastEpochs = 64

// keyPastEpochs holds version 1 | JSON array of pastEpoch, the oldest first.
// Written to disk: never renumber, never reuse.
var keyPastEpochs = []byte{kv.PrefixMeta, 'e', 'p', 'o', 'c', 'h', 's'}

// readPastEpochs is part of Open.
func (s *Spool) readPastEpochs() error {
	v, found, err := s.store.Get(keyPastEpochs)
	if err != nil || !found {
		return err
	}
	if len(v) > 0 && v[0] > rowV1 {
		return fmt.Errorf("row of past epochs: %w %d", ErrVersion, v[0])
	}
	if len(v) == 0 || json.Unmarshal(v[1:], &s.past) != nil {
		// What was restored goes on under the ids of this epoch, which has no other messages of these sequences.
		s.past = nil
		s.cfg.Log.Error("row of past epochs is damaged: messages from before a restore get new ids")
	}
	return nil
}

// beginEpoch gives the spool a new epoch because of cause, unless it has done so before. It is part of Open, after the lanes.
func (s *Spool) beginEpoch(cause string) error {
	if slices.ContainsFunc(s.past, func(p pastEpoch) bool { return p.Cause == cause }) {
		return nil
	}
	id, err := uuid.NewV7()
	if err != nil {
		return fmt.Errorf("make epoch: %w", err)
	}
	old := pastEpoch{ID: s.epoch, Cause: cause, Until: map[byte]Position{}}
	for _, l := range s.lanes {
		old.Until[l.number] = l.durable
	}
	past := append(slices.Clone(s.past), old)
	past = past[max(0, len(past)-maxPastEpochs):]
	row, err := json.Marshal(past)
	if err != nil {
		return fmt.Errorf("make epoch: %w", err)
	}
	err = s.store.ApplyWait([]kv.Op{
		{Key: keyEpoch, Value: []byte(id.String())},
		{Key: keyPastEpochs, Value: append([]byte{rowV1}, row...)},
	})
	if err != nil {
		return err
	}
	s.epoch, s.past = id.String(), past
	return nil
}

// EpochOf returns the epoch that is part of a message's id, and the sequences around it, from first to before end, that have
// the same.
func (s *Spool) EpochOf(lane string, seq uint64) (epoch string, first, end uint64) {
	first = 1
	number, ok := s.names[lane]
	for i := range s.past {
		if !ok {
			break
		}
		until := max(s.past[i].Until[s.lanes[number].number].Seq, first)
		if seq < until {
			return s.past[i].ID, first, until
		}
		first = until
	}
	return s.epoch, first, math.MaxUint64
}

// PastEpochs returns the epochs before this one that still name messages, the oldest first.
func (s *Spool) PastEpochs() []string {
	ids := make([]string, 0, len(s.past))
	for _, p := range s.past {
		ids = append(ids, p.ID)
	}
	return ids
}

// byEpoch cuts stretches of a lane's messages where the epoch changes.
func (s *Spool) byEpoch(l *lane, losses []loss) []loss {
	if len(s.past) == 0 || len(losses) == 0 {
		return losses
	}
	var parts []loss
	for _, lost := range losses {
		for i := range s.past {
			until := s.past[i].Until[l.number]
			if lost.from.Seq < until.Seq && until.Seq < lost.to.Seq {
				part := lost
				part.to = until
				parts = append(parts, part)
				lost.from = until
			}
		}
		parts = append(parts, lost)
	}
	return parts
}

// keyGateway holds the gateway's id, text, for tools that find the store without its configuration.
// Written to disk: never renumber, never reuse.
var keyGateway = []byte{kv.PrefixMeta, 'g', 'a', 't', 'e', 'w', 'a', 'y'}

// GatewayOf returns the id of the gateway that had the store open last, "" if it never was.
func GatewayOf(store *kv.Store) (string, error) {
	v, _, err := store.Get(keyGateway)
	return string(v), err
}

// writeGateway is part of Open.
func (s *Spool) writeGateway() error {
	if s.cfg.Gateway == "" {
		return nil
	}
	id, err := GatewayOf(s.store)
	if err != nil || id == s.cfg.Gateway {
		return err
	}
	return s.store.ApplyWait([]kv.Op{{Key: keyGateway, Value: []byte(s.cfg.Gateway)}})
}

// Gateway returns the gateway's id, as it was configured.
func (s *Spool) Gateway() string { return s.cfg.Gateway }

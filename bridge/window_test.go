package bridge_test

import (
	"maps"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"holdfast/bridge"
	"holdfast/spool"
)

// modelFlight is one flight of the model: the window as it would be written without thinking of speed.
type modelFlight struct {
	token   uint64 // 0: needs no send
	end     spool.Position
	records int
	size    int
	landed  bool
	outcome spool.Outcome
}

// modelLane is a lane, its cursor, and every send ever made.
type modelLane struct {
	next    spool.Position // of the next record
	cursor  spool.Position
	flights []modelFlight
}

// TestWindowAgainstModel drives the window with random sends, acks in any order, acks twice, acks of
// links that are gone, and lost links, and compares every cursor with the model's.
func TestWindowAgainstModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		lanes := rapid.IntRange(1, 4).Draw(t, "lanes")
		w := bridge.NewWindow(lanes)
		model := make([]modelLane, lanes)
		for i := range model {
			model[i].next = spool.Position{Seq: 1}
			model[i].cursor = model[i].next
		}
		issued := map[uint64]bool{} // all tokens, for ever
		stale := []uint64{}         // of flights that are not there any more
		settle := func(i int) {
			m := &model[i]
			var want []modelFlight
			for len(m.flights) > 0 && m.flights[0].landed {
				want = append(want, m.flights[0])
				m.flights = m.flights[1:]
			}
			w.Settle(i, func(end spool.Position, records int, o spool.Outcome) {
				for records > 0 {
					if len(want) == 0 {
						t.Fatalf("lane %d: resolved up to %v, beyond the acknowledged prefix", i, end)
					}
					if want[0].outcome != o {
						t.Fatalf("lane %d: records up to %v ended as %v, want %v", i, want[0].end, o, want[0].outcome)
					}
					if o == spool.Parked && records != want[0].records {
						t.Fatalf("lane %d: a parked record was joined with others", i)
					}
					records -= want[0].records
					m.cursor = want[0].end
					if want[0].token != 0 {
						stale = append(stale, want[0].token)
					}
					want = want[1:]
				}
				if records != 0 || m.cursor != end {
					t.Fatalf("lane %d: resolved up to %v, want %v", i, end, m.cursor)
				}
			})
			if len(want) > 0 {
				t.Fatalf("lane %d: cursor stays before %v although all up to it is acknowledged", i, want[0].end)
			}
		}
		take := func(i, n int) spool.Position {
			m := &model[i]
			m.next.Seq += uint64(n)
			m.next.Bytes += uint64(n * 100)
			return m.next
		}
		t.Repeat(map[string]func(*rapid.T){
			"send": func(t *rapid.T) {
				i, n := rapid.IntRange(0, lanes-1).Draw(t, "lane"), rapid.IntRange(1, 5).Draw(t, "records")
				f := modelFlight{end: take(i, n), records: n, size: rapid.IntRange(1, 1000).Draw(t, "size")}
				f.token = w.Send(i, f.end, n, f.size)
				if issued[f.token] {
					t.Fatalf("token %d was given before", f.token)
				}
				issued[f.token] = true
				model[i].flights = append(model[i].flights, f)
			},
			"pass": func(t *rapid.T) {
				i := rapid.IntRange(0, lanes-1).Draw(t, "lane")
				o := rapid.SampledFrom([]spool.Outcome{spool.Expired, spool.Delivered, spool.Parked}).Draw(t, "outcome")
				f := modelFlight{end: take(i, 1), records: 1, landed: true, outcome: o}
				var record []byte
				if o == spool.Parked {
					record = make([]byte, 10)
					f.size = 10
				}
				w.Pass(i, f.end, 1, o, record)
				model[i].flights = append(model[i].flights, f)
			},
			"ack": func(t *rapid.T) {
				var open []uint64
				for i := range model {
					for _, f := range model[i].flights {
						if !f.landed {
							open = append(open, f.token)
						}
					}
				}
				if len(open) == 0 {
					t.Skip("nothing in flight")
				}
				token := rapid.SampledFrom(open).Draw(t, "token")
				o := rapid.SampledFrom([]spool.Outcome{spool.Delivered, spool.Parked}).Draw(t, "outcome")
				if !w.Ack(token, o) {
					t.Fatalf("ack of a flight in the air was ignored")
				}
				for i := range model {
					for k := range model[i].flights {
						if f := &model[i].flights[k]; f.token == token {
							f.landed, f.outcome = true, o
						}
					}
				}
				if w.Ack(token, o) {
					t.Fatalf("second ack of the same flight was taken")
				}
				if rapid.Bool().Draw(t, "settle") {
					for i := range lanes {
						settle(i)
					}
				}
			},
			"ack of what is gone": func(t *rapid.T) {
				token := rapid.Uint64().Draw(t, "any")
				if len(stale) > 0 && rapid.Bool().Draw(t, "stale") {
					token = rapid.SampledFrom(stale).Draw(t, "token")
				}
				if !issued[token] || slices.Contains(stale, token) {
					if w.Ack(token, spool.Delivered) {
						t.Fatalf("ack of token %d, which is not in flight, was taken", token)
					}
				}
			},
			"settle": func(*rapid.T) {
				for i := range lanes {
					settle(i)
				}
			},
			"link lost": func(*rapid.T) {
				for i := range model {
					w.Reset(i)
					m := &model[i]
					for _, f := range m.flights {
						if f.token != 0 {
							stale = append(stale, f.token)
						}
					}
					m.flights, m.next = nil, m.cursor
				}
			},
			"": func(t *rapid.T) {
				// Bounds: what the window says it holds is no less than what the model holds unsettled.
				bytes, unacked := 0, 0
				for i := range model {
					for _, f := range model[i].flights {
						bytes += f.size
						if !f.landed {
							unacked++
						}
					}
				}
				if w.Bytes() != bytes {
					t.Fatalf("window holds %d bytes, model %d", w.Bytes(), bytes)
				}
				if w.Sends() < unacked {
					t.Fatalf("window counts %d sends, model %d", w.Sends(), unacked)
				}
				if (w.Oldest() == 0) != (unacked == 0) {
					t.Fatalf("oldest is %d with %d unacked", w.Oldest(), unacked)
				}
			},
		})
	})
}

// TestWindowIsBoundedBehindOneSend: records that end without a send take no room behind a send that is not
// acked, however many they are.
func TestWindowIsBoundedBehindOneSend(t *testing.T) {
	w := bridge.NewWindow(1)
	token := w.Send(0, spool.Position{Seq: 2, Bytes: 100}, 1, 100)
	const n = 100_000
	for i := range uint64(n) {
		w.Pass(0, spool.Position{Seq: 3 + i, Bytes: 200 + i*100}, 1, spool.Expired, nil)
	}
	if w.Sends() != 2 || w.Slots(0) > 16 || w.Bytes() != 100 {
		t.Fatalf("%d flights in %d slots, %d bytes", w.Sends(), w.Slots(0), w.Bytes())
	}
	w.Ack(token, spool.Delivered)
	got := map[spool.Outcome]int{}
	w.Settle(0, func(_ spool.Position, records int, o spool.Outcome) { got[o] += records })
	if want := map[spool.Outcome]int{spool.Delivered: 1, spool.Expired: n}; !maps.Equal(got, want) {
		t.Fatalf("got %v, want %v", got, want)
	}
}

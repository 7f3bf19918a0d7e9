// Package broker is the MQTT broker that devices connect to: MQTT 3.1.1 and 5 over TCP, TLS
// and websockets. It takes no message for its own: a publish is handed to an Intake and
// acknowledged when that has made it durable. It is the only importer of mochi-mqtt.
//
// # The way of a PUBLISH
//
//	serve (conn.go)  reads many packets a system call, splits, checks them with internal/mqtt
//	publish.go       alias, limits, ACL, QoS 2 repeat; takes a slot in the connection's ring;
//	                 Intake.Publish(message, rows, done = connection, token = slot); goes on reading
//	conn.Done        on the store's goroutine, after the fsync: the slot is done; all slots up to
//	                 the first open one give their answers into the connection's out buffer, in the
//	                 order of the publishes (MQTT 5.0 §4.6), and their messages to the fan-out
//	Broker.flush     once a group (kv.Store.OnGroup): each connection that got answers gets one write
//	fanout.go        one goroutine, in order of the commits: retained messages, local subscribers
//	session.go       queue of one client; its connection's flush takes from it
//
// # What mochi does here, and what it does not
//
// mochi-mqtt/server 2.7.9 holds the index of subscriptions, shared ones included, and handles
// SUBSCRIBE and UNSUBSCRIBE: checks, reason codes, SUBACK and UNSUBACK (subscribe.go, hook.go).
// It is fed decoded packets with Server.InjectPacket and never sees a socket. Its own
// connection loop (Server.EstablishConnection) is not used: measured with 5,000 idle
// connections it costs 24.9 KiB each, 20 KiB of that the stacks of its two goroutines, where
// this package takes 9.2 KiB in all; and a takeover races with the clean-up of the old
// connection, which removes subscriptions of the new one. Server.Serve is not called either:
// its event loop copies all clients once a second.
//
// What it would do by itself on its usual way from PUBLISH to acknowledgement, and who does it
// now. Each line has its tests for MQTT 3.1.1 and 5; docs/mqtt.md names them.
//
//   - decode and validate packets: internal/mqtt, strictly, before anything else sees them
//   - CONNECT, authentication, CONNACK, takeover, session present: connect.go, session.go
//   - keep alive and all deadlines: conn.go
//   - receive maximum of the client's messages: conn.reserve; of ours: session.fill
//   - ACL: the Rights that CONNECT gave (rights.go), asked in publish.go for messages, will.go for
//     wills, fanout.go at each delivery; admin.go takes subscriptions away when they change
//   - topic aliases: inflow.alias; none are sent
//   - acknowledgements and their order: the ring in publish.go
//   - QoS 2 from the client, its packet ids durable: qos2.go
//   - QoS 1 and 2 to the client, with packet ids of our own: session.go. mochi has one map
//     of ids for both directions, so that a publish could delete an unacknowledged delivery
//   - retained messages: retained.go, rows in the same commit as the message
//   - fan-out to subscribers, overlapping subscriptions, No Local, Retain As Published,
//     subscription identifiers, shared subscriptions: fanout.go
//   - message expiry: session.fill, retained.go
//   - wills, with delay: will.go. mochi would publish them past every hook
//   - session expiry: session.go. mochi would leave the subscriptions of an expired client in
//     its index
//   - sessions and subscriptions across restarts: rows.go
//
// # What it would not do
//
//   - commands: link.go gives a Watcher each connection as a Link. What is sent there shares packet
//     ids and receive maximum with the session's deliveries, and is not kept by the session
//   - who a session belongs to: session.attach compares principals
//   - limits of what one client publishes: limits.go
//   - end a client from outside: admin.go
//   - certificates that change, revocation, few handshakes at once: tls.go, handshake.go
package broker

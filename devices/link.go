package devices

import "time"

// Link is one connection of a device, as the queue sees it. gateway implements it on the broker. Its methods do
// not block and may be called from any goroutine, also when the connection has ended. They must not wait for a lock that
// somebody holds while calling the queue. Two values of the same connection are equal (==).
type Link interface {
	// Alive says whether the connection has not ended. It has at the latest when a newer one of the device is Ready.
	Alive() bool
	// Covers says whether the device has subscribed to topic with QoS 1 or 2.
	Covers(topic string) bool
	// Send has d written to this connection, after all that was queued before. It returns the packet id. An error
	// means that it is not and will not be written: ErrGone, or ErrPacketTooLarge.
	Send(d *Delivery) (packetID uint16, err error)
	// End closes the connection; the device is told why where MQTT can say it.
	End(reason string)
}

// Delivery is one PUBLISH of a command, QoS 1, on cmd/{device}/req/{id}/{name}.
type Delivery struct {
	Device, ID, Name string
	Payload          []byte // not to be changed
	ContentType      string
	Expiry           time.Duration // what is left of its time to live
	Dup              bool          // it was sent before
	PacketID         uint16        // under which it was sent last; 0: never, or in a session that has ended
	Token            uint64        // comes back with Queue.Acked
}
